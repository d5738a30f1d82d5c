"""C kernels of our own, compiled on this machine for its processor by the compiler that it has.

For what PyTorch does not have. The files of C are compiled at their first use (a second or two) and kept in the studio's cache,
by their content, the compiler and the processor's instructions. Where that cannot be, callers compute the same numbers with
the library's operators; a run's environment says which it was.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from studio_state.paths import default_cache_root

FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
SOURCES, HEADERS = ("packed_rows.c", "lean_rows.c"), ("packed_rows.h", "lean_attention.h", "lean_layer.h")
CARRIED: dict[str, str] = {}  # texts of these files in an exported script; else they lie beside this module
SECONDS = 120  # a compiler that takes longer hangs


@dataclass(frozen=True)
class Built:
    """The compiled functions, or why there are none.

    Attributes:
        library: the functions; None = callers do without.
        told: compiler and flags, or the reason.
    """

    library: ctypes.CDLL | None
    told: str


@cache
def kernels() -> Built:
    """Compile what is not compiled yet, and load it. torch must be imported before: both share its threads."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if not shutil.which(compiler[0]):
        return Built(None, f"not compiled: this machine has no C compiler {compiler[0]}")
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.SubprocessError as e:
        why = (getattr(e, "stderr", "") or str(e)).strip().splitlines()
        return Built(None, f"not compiled: {' '.join(compiler)} failed: {why[0] if why else e}")
    except OSError as e:
        return Built(None, f"not compiled: the result could not be kept or loaded: {e}")
    if not library.available():
        return Built(None, "not used: this processor lacks AVX-512 VNNI")
    return Built(library, f"compiled by {' '.join([*compiler, *FLAGS])}")


def _compiled(compiler: list[str]) -> Path:
    """The shared library of :data:`SOURCES`; what a compiler defines by itself names its version and the processor's instructions."""
    defines = _run([*compiler, *FLAGS[:3], "-dM", "-E", "-x", "c", os.devnull])
    texts = {
        name: CARRIED.get(name) or Path(__file__).with_name(name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)
    }
    key = hashlib.sha256("\0".join((*texts.values(), " ".join([*compiler, *FLAGS]), defines)).encode()).hexdigest()
    target = default_cache_root() / "native" / f"kernels-{key[:16]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as draft:  # several workers may do this at once
            for name, text in texts.items():
                (Path(draft) / name).write_text(text, encoding="utf-8")
            made = Path(draft) / target.name
            _run([*compiler, *FLAGS, *(str(Path(draft) / name) for name in SOURCES), "-o", str(made)])
            made.replace(target)
    return target


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS, stdin=subprocess.DEVNULL).stdout
