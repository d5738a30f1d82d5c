"""A llama.cpp of our own: compiled once on this machine, for exactly this processor, and driven as a program.

The sources come inside the sdist of llama-cpp-python, so that a package index is all that is needed. CMake and Ninja come into a
virtual environment under the studio's cache; nothing of it enters the studio's own. What is compiled is llama.cpp's own
``llama-bench``, which times decode steps without loading, reading the prompt and sampling, and ``llama-quantize``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
from filelock import FileLock

from studio_state.errors import ModelError, StudioError, Unavailable
from studio_state.paths import default_cache_root
from studio_state.zoo import PackageFile, entries, find
from workers.models import package
from workers.models.gguf_file import read_facts
from workers.models.talk import silent

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
COMMIT = "0c1e57098"  # of ggml-org/llama.cpp, by the changelog of the package
TOOLS = ("cmake==4.4.5", "ninja==1.13.2")
TARGETS = ("llama-bench", "llama-quantize")
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "GGML_NATIVE=ON",  # -march=native
    "BUILD_SHARED_LIBS=OFF",
    "GGML_CCACHE=OFF",
    *(f"LLAMA_{part}=OFF" for part in ("OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "BUILD_APP")),
    # GCC 12 takes the settings of AMX tiles for stores that nobody reads, drops them, and reading a prompt ends in an illegal instruction.
    "CMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse",
    "CMAKE_EXPORT_COMPILE_COMMANDS=ON",  # the flags are read from there
    "LLAMA_BUILD_NUMBER=0",
    f"LLAMA_BUILD_COMMIT={COMMIT}",
)
KERNELS = "ggml-cpu/repack.cpp"  # the file whose flags are told: products of packed weights
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Timing:
    """What ``llama-bench`` measured in one setting.

    Attributes:
        flash: attention in llama.cpp's fused kernel.
        speeds: decoded tokens per second, one a repetition.
    """

    flash: bool
    speeds: list[float]


@dataclass(frozen=True)
class Built:
    """A finished build.

    Attributes:
        flags: of the compiler, for the products of packed weights.
        compiler: its name and version.
    """

    folder: Path
    flags: str
    compiler: str

    @property
    def told(self) -> str:
        """Version and flags, in one line."""
        return f"llama.cpp {COMMIT} (sources of {PACKAGE} {VERSION}), {self.compiler}: {self.flags}"

    def tool(self, name: str) -> Path:
        """One of :data:`TARGETS`."""
        return self.folder / "build" / "bin" / name

    def requantised(self, file: Path, kind: str) -> Path:
        """The model of a GGUF file in another format, made once; the file itself if it has that format already.

        Raises:
            StudioError: ``llama-quantize`` failed.
        """
        if read_facts(file).kind == kind:
            return file
        made = _models() / f"{package.sha256_of(file)[:12]}.{kind}.gguf"
        if not made.is_file():
            made.parent.mkdir(parents=True, exist_ok=True)
            part = made.with_suffix(".part")
            self._run("llama-quantize", "--allow-requantize", str(file), str(part), kind)
            part.replace(made)
        return made

    def buffers(self, file: Path, threads: int) -> dict[str, float]:
        """Megabytes of weights by llama.cpp's kind of buffer, as its own log of loading tells; ``CPU_REPACK`` holds repacked ones."""
        options = ("-v", "-r", "1", "-p", "0", "-n", "1", "--no-warmup")
        return buffers(self._run("llama-bench", "-m", str(file), "-t", str(threads), *options).stderr)

    def decode(self, file: Path, threads: int, prompt_tokens: int, new_tokens: int, repeats: int) -> list[Timing]:
        """Time decode steps behind a prompt, with and without fused attention; one process, one load.

        Raises:
            StudioError: ``llama-bench`` failed.
        """
        sizes = ("-t", str(threads), "-d", str(prompt_tokens), "-p", "0", "-n", str(new_tokens), "-r", str(repeats))
        return timings(self._run("llama-bench", "-m", str(file), *sizes, "-fa", "off,on", "-o", "json").stdout)

    def _run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([str(self.tool(name)), *arguments], capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            ended = [f"the system ended it ({signal.Signals(-done.returncode).name})"] if done.returncode < 0 else ["no message"]
            raise StudioError(f"{name} failed: {(done.stderr.strip().splitlines() or ended)[-1]}")
        return done


def timings(text: str) -> list[Timing]:
    """Read what ``llama-bench -o json`` prints."""
    return [Timing(int(t["flash_attn"]) > 0, [float(s) for s in t["samples_ts"]]) for t in json.loads(text)]


def buffers(log: str) -> dict[str, float]:
    """Megabytes of weights by kind of buffer, from the lines that llama.cpp logs while it loads."""
    found = re.findall(r"(\S+) model buffer size = +([\d.]+) MiB", log)
    return {kind: float(size) * 2**20 / 1e6 for kind, size in found}


def flags(compile_commands: str) -> str:
    """The optimising flags of :data:`KERNELS`, from CMake's ``compile_commands.json``.

    Raises:
        StudioError: the file is not among them.
    """
    for entry in json.loads(compile_commands):
        if entry["file"].replace(os.sep, "/").endswith(KERNELS):
            words = shlex.split(entry["command"])
            return " ".join(w for w in words if w.startswith(("-O", "-m", "-f")) or w == "-DNDEBUG" or w.startswith("-DGGML_USE"))
    raise StudioError(f"CMake lists no {KERNELS}; the sources of {PACKAGE} {VERSION} have changed")


def compiler(notes: str) -> str:
    """Name and version of the C++ compiler, from what CMake wrote down of it."""
    found = dict(re.findall(r'set\(CMAKE_CXX_COMPILER_(ID|VERSION) "([^"]*)"\)', notes))
    return " ".join(found[key] for key in ("ID", "VERSION") if found.get(key)) or "compiler unknown"


def home() -> Path:
    """Folder of this version's build."""
    return default_cache_root() / "llama-cpp" / VERSION


def _models() -> Path:
    return home() / "models"


def found() -> Built | None:
    """The finished build, if there is one."""
    try:
        told = json.loads((home() / "built.json").read_text(encoding="utf-8"))
        built, options = Built(home(), told["flags"], told["compiler"]), told["options"]
    except (OSError, ValueError, KeyError):
        return None
    return built if options == list(OPTIONS) and all(built.tool(name).is_file() for name in TARGETS) else None


def build(tell: Tell) -> Built:
    """Compile, unless that is done; what an interrupted call made is used.

    Args:
        tell: gets a line before each long step.

    Raises:
        Unavailable: a tool that cannot come from the package index is missing; no network; no room.
        StudioError: a step failed; the message names its log.
    """
    present = found()
    if present is not None:
        return present
    _require_tools()
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            return found() or _build(folder, tell)
    except OSError as e:
        raise Unavailable(f"llama.cpp cannot be built in {folder}: {e.strerror or e}; make room or give permission") from e


def _require_tools() -> None:
    compilers = [shlex.split(os.environ.get(variable) or default)[0] for variable, default in (("CC", "cc"), ("CXX", "c++"))]
    missing = [name for name in compilers if not shutil.which(name)]
    if missing:
        raise Unavailable(
            f"llama.cpp is compiled on this machine, which has no {' and no '.join(missing)}; install a C and C++ compiler "
            "(Debian, Ubuntu: apt-get install g++; macOS: xcode-select --install), then run it again"
        )
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        raise Unavailable(
            "llama.cpp gets a virtual environment, which this Python cannot make; install python3-venv, then run it again"
        )


def _build(folder: Path, tell: Tell) -> Built:
    """The caller holds the lock."""
    binaries, log = folder / "venv" / "bin", folder / "build.log"
    log.write_bytes(b"")
    if not all((binaries / tool.partition("=")[0]).is_file() for tool in TOOLS):
        _step([sys.executable, "-m", "venv", "--clear", str(folder / "venv")], log)
        _step([str(binaries / "python"), "-m", "pip", "--disable-pip-version-check", "install", *TOOLS], log, network=True)
    source = folder / "source"
    if not source.is_dir():
        tell(f"fetching the sources of {PACKAGE} {VERSION} (77 MB)")
        _fetch_sources(binaries / "python", source, log)
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"}
    configure = ["cmake", "-S", str(source), "-B", str(folder / "build"), "-G", "Ninja", *(f"-D{option}" for option in OPTIONS)]
    _step(configure, log, environment)
    jobs = psutil.cpu_count() or 1
    tell(f"compiling llama.cpp for this processor, once, in {jobs} processes (minutes; follow it in {log})")
    _step(["cmake", "--build", str(folder / "build"), "--parallel", str(jobs), "--target", *TARGETS], log, environment)
    commands = (folder / "build" / "compile_commands.json").read_text(encoding="utf-8")
    notes = [file.read_text(encoding="utf-8") for file in (folder / "build" / "CMakeFiles").glob("*/CMakeCXXCompiler.cmake")]
    told = {"flags": flags(commands), "compiler": compiler("".join(notes))}
    (folder / "built.json").write_text(json.dumps({**told, "options": OPTIONS}) + "\n", encoding="utf-8")
    return Built(folder, **told)


def _fetch_sources(python: Path, to: Path, log: Path) -> None:
    """Unpack llama.cpp alone out of the checked sdist."""
    for left_over in to.parent.glob(".sources-*"):  # of calls that were killed
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".sources-", dir=to.parent) as draft:
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--no-binary=:all:"]
        _step([*command, "--dest", draft, f"{PACKAGE}=={VERSION}"], log, network=True)
        (archive,) = Path(draft).glob("*.tar.gz")
        if package.sha256_of(archive) != SDIST_SHA256:
            raise StudioError(f"{archive.name} is not the file that was pinned; look at where pip took it from")
        with tarfile.open(archive) as tar:
            inside = f"{tar.getnames()[0].partition('/')[0]}/vendor/llama.cpp"
            tar.extractall(draft, [m for m in tar.getmembers() if m.name.startswith(inside)], filter="data")
        (Path(draft) / inside).rename(to)


def _step(command: Sequence[str], log: Path, environment: dict[str, str] | None = None, network: bool = False) -> None:
    """Run a program, its output at the end of the log.

    Raises:
        Unavailable: it failed and needed a network.
        StudioError: it failed.
    """
    with log.open("ab") as out:
        done = subprocess.run(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment, check=False)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        why = [line.strip() for line in lines if "error" in line.lower()] or lines or ["no message"]
        if network:
            raise Unavailable(f"llama.cpp is built from the package index, which cannot be reached; connect to it ({why[-1]})")
        raise StudioError(f"building llama.cpp failed: {why[-1]} (all of it: {log})")


def model_file(model: str) -> Path:
    """The GGUF file of a model: of a zoo model the one that it was made of, fetched once; or the file itself.

    Raises:
        Unavailable: this model does not come from a GGUF file.
        ModelError: it cannot be fetched.
    """
    entry, path = find(model), Path(model).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path.absolute()
    if entry is None or not isinstance(entry.source, PackageFile) or entry.source.format != "gguf":
        known = [e.id for e in entries() if isinstance(e.source, PackageFile) and e.source.format == "gguf"]
        raise Unavailable(
            f"llama.cpp reads GGUF files and {model} is none; give a .gguf file, or {' or '.join(known)}, with --model"
        )
    kept = _models() / Path(entry.source.file).name
    if kept.is_file() and kept.stat().st_size == entry.source.file_bytes:
        return kept
    try:
        _models().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_models()) as draft:
            package.unconverted(entry, entry.source, Path(draft), silent).replace(kept)
    except OSError as e:
        raise ModelError(f"cannot keep {kept}: {e.strerror or e}; make room or give permission") from e
    return kept
