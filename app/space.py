"""Assembles a Hugging Face Space (Gradio SDK) that runs the studio for strangers.

A Space installs ``requirements.txt`` before its own files are there, so the studio cannot be a wheel beside it: its packages
are copied as source folders, and the entry file is ``main.py``, for an ``app.py`` would shadow the package ``app``. The build asks pip for the requirements and for
``gradio[oauth,mcp]`` at ``sdk_version``, ``uvicorn``, ``websockets`` and ``spaces`` in one go, so all must agree.

ZeroGPU is out of scope: it forks the page's process for every decorated function and wants the models in that process,
where the studio never loads torch; it would need a second kind of dispatcher. Nothing here talks to the Hub.
"""

from __future__ import annotations

import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import app
from app.components.numbers import byte_quantity
from app.hosted import HostedLimits
from studio_state import __version__, zoo
from studio_state.errors import SpecError, StoreError, Unavailable

ROOT = Path(app.__file__).resolve().parents[1]
PACKAGES = ("app", "workers", "studio_state", "assets")
LEFT_OUT = ("assets/docs", "assets/images", "assets/space", "workers/bench")  # nothing of these is read by a running studio
ENTRY = "main.py"
TITLE = "Pareto Studio"
MAX_TITLE = 100
# A Space installs its requirements together with gradio[oauth,mcp], whose extra for MCP does not take the studio's own pin.
HELD_BACK = {"pydantic": "2.12.5"}
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
ATTRIBUTES = "".join(f"*.{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in ("safetensors", "gz"))
MAIN = '''"""Starts Pareto Studio in this Space; what it heeds stands in app/space_start.py."""

from app.space_start import main

if __name__ == "__main__":
    main()
'''


@dataclass(frozen=True)
class Space:
    """What was written: how many files with how many bytes, the history of a repository not counted."""

    folder: Path
    files: int
    bytes: int


def assemble(folder: Path, title: str = TITLE, force: bool = False) -> Space:
    """Write a Space. It is put together beside the folder and takes its place at the end, so there is never half of one.

    Args:
        force: replace the Space that is in the folder; its ``.git`` is kept.

    Raises:
        SpecError: the title or the folder are refused.
        Unavailable: the list of pinned packages, the licence or a text is missing from this installation.
        StoreError: it cannot be written.
    """
    folder, title = folder.expanduser().resolve(), " ".join(title.split())
    _check(folder, title, force)
    texts = {
        "README.md": readme(title), "requirements.txt": requirements(pinned()), ENTRY: MAIN, ".gitattributes": ATTRIBUTES,
        "LICENSE": licence(),
    }  # fmt: skip
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        part.chmod(0o755)
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")
        for file in sources():
            target = part / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        sizes = [p.stat().st_size for p in part.rglob("*") if p.is_file()]
        _take_place(part, folder)
    except OSError as e:
        raise StoreError(f"cannot write the Space to {folder}: {e.strerror or e}; free it, or choose another folder") from e
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    return Space(folder, len(sizes), sum(sizes))


def _check(folder: Path, title: str, force: bool) -> None:
    if not title or len(title) > MAX_TITLE:
        raise SpecError(f"a title of {len(title)} characters is not allowed; give --title 1 to {MAX_TITLE} characters")
    if any(folder.is_relative_to(ROOT / p) or (ROOT / p).is_relative_to(folder) for p in PACKAGES):
        raise SpecError(f"{folder} holds the studio itself, or is a part of it; choose a folder elsewhere")
    if folder == Path.cwd():
        raise SpecError(
            f"{folder} is the folder that you stand in, which is to be replaced as a whole; go one up and name it from there"
        )
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"{folder} is a file; choose a folder that is empty or does not exist yet")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not force:
        raise SpecError(f"{folder} is not empty; choose another folder, or add --force to replace the Space in it")
    if not is_space(folder):
        raise SpecError(
            f"{folder} holds no Space (a README.md with `sdk:` in its front matter), so --force does not replace it; choose another folder"
        )


def is_space(folder: Path) -> bool:
    """True if the folder's README.md begins with the front matter of a Space."""
    try:
        _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        return "sdk" in (yaml.safe_load(front) or {})
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return False


def _take_place(part: Path, folder: Path) -> None:
    """Rename the finished Space to its place; what was there is put aside first and removed at the end."""
    if not folder.exists():
        part.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent)) / "old"
    folder.rename(aside)
    try:
        part.rename(folder)
        if (aside / ".git").exists():
            (aside / ".git").rename(folder / ".git")
    except OSError:
        if folder.exists():
            folder.rename(part)
        aside.rename(folder)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)


def sources() -> Iterator[Path]:
    """The files of the studio that a Space needs: its packages, and of the zoo the models that ship with it."""
    shipped = zoo.shipped_folders()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            parts = path.relative_to(ROOT).parts
            unwanted = any(p.startswith((".", "__pycache__")) for p in parts) or path.suffix in (".pyc", ".pyi", ".part")
            left_out = any(path.is_relative_to(ROOT / name) for name in LEFT_OUT)
            not_shipped = parts[:2] == ("assets", "zoo") and len(parts) > 2 and parts[2] not in shipped
            if path.is_file() and not (unwanted or left_out or not_shipped):
                yield path


def front_matter(title: str) -> dict[str, Any]:
    """What the Hub reads at the top of README.md (its reference: docs/hub/spaces-config-reference)."""
    return {
        "title": title,
        "emoji": "🏁",
        "colorFrom": "blue",
        "colorTo": "indigo",
        "sdk": "gradio",
        "sdk_version": metadata.version("gradio"),
        "python_version": "3.12",
        "app_file": ENTRY,
        "short_description": "Race efficiency policies against a model's baseline",
        "license": "apache-2.0",
        "suggested_hardware": "cpu-basic",
        "startup_duration_timeout": "30m",
        "fullWidth": True,
        "header": "mini",
        "tags": ["efficiency", "quantization", "kv-cache", "token-reduction", "benchmark"],
    }


def readme(title: str) -> str:
    """README.md: the front matter, what runs here, what to expect, and what the owner can set.

    Raises:
        Unavailable: its text is missing from this installation.
    """
    limits = HostedLimits()
    shipped = [f"| `{e.id}` | {e.title}: {e.use} |" for e in zoo.entries() if isinstance(e.source, zoo.InRepo)]
    fetched = [f"`{e.id}` ({_size(e.source.download_bytes)})" for e in zoo.entries() if isinstance(e.source, zoo.PackageFile)]
    fetched += [f"`{e.id}` (made of `{e.source.base}`)" for e in zoo.entries() if isinstance(e.source, zoo.Rearranged)]
    torch = next(pin for pin in pinned() if pin.startswith("torch=="))
    card = ROOT / "assets/space/card.md"
    if not card.is_file():
        raise Unavailable("the text for a Space is missing from this installation of the studio; install it again")
    body = card.read_text(encoding="utf-8").format(
        title=title, version=__version__, entry=ENTRY, torch=torch, models="\n".join(shipped), fetched=", ".join(fetched),
        minutes=f"{limits.minutes:g}", lanes=limits.lanes, download=_size(limits.download_bytes),
    )  # fmt: skip
    front = str(yaml.safe_dump(front_matter(title), sort_keys=False, allow_unicode=True))
    return f"---\n{front}---\n\n{body}"


def _size(value: int) -> str:
    quantity = byte_quantity(value)
    return f"{quantity.text} {quantity.unit}"


def requirements(pins: list[str]) -> str:
    """requirements.txt: the pins without gradio, which ``sdk_version`` gives, and torch as its build without CUDA.

    A package of ``HELD_BACK`` stands at its own version.
    """
    lines = []
    for pin in pins:
        name = pin.partition("==")[0]
        if name == "torch":
            lines += [f"--extra-index-url {TORCH_INDEX}", f"{pin}+cpu"]
        elif name != "gradio":
            lines.append(f"{name}=={HELD_BACK[name]}" if name in HELD_BACK else pin)
    return "\n".join(lines) + "\n"


def pinned() -> list[str]:
    """The studio's dependencies: of ``pyproject.toml`` in a checkout, else of the installed distribution.

    Raises:
        Unavailable: neither is there.
    """
    project = ROOT / "pyproject.toml"
    if project.is_file():
        found = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
        return [str(pin) for pin in found]
    return [r.partition(";")[0].strip() for r in _distribution().requires or () if "extra ==" not in r]


def licence() -> str:
    """The text of the licence, found like :func:`pinned`.

    Raises:
        Unavailable: it is not there.
    """
    if (ROOT / "LICENSE").is_file():
        return (ROOT / "LICENSE").read_text(encoding="utf-8")
    found = next((f for f in _distribution().files or () if f.name == "LICENSE"), None)
    if found is None:
        raise Unavailable("the licence of the studio is missing from this installation; install it again")
    return found.read_text(encoding="utf-8")


def _distribution() -> metadata.Distribution:
    try:
        return metadata.distribution("pareto-studio")
    except metadata.PackageNotFoundError as e:
        raise Unavailable(
            f"the studio in {ROOT} is neither a checkout nor installed, so its pinned packages are not known; "
            "install it, or run this in a checkout"
        ) from e
