"""Repositories of the Hugging Face Hub: only what loading needs, into the Hub's own cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from studio_state.errors import ModelError
from workers.models.talk import Progress, first_line, silent

HUB_ID = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.][\w./-]*))?$")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "tokenizer*"]
_UNWANTED = ["original/*", "onnx/*", "openvino/*", "runs/*", *(f"*{p}" for p in PICKLES)]
_LOOK_UP_S = 15
LIMIT_VARIABLE = "PARETO_STUDIO_MAX_DOWNLOAD"


def download(
    repo: str, revision: str | None = None, trust_remote_code: bool = False, progress: Progress = silent
) -> tuple[Path, str]:
    """Snapshot of a repository (safetensors, configs and tokenizer only) and its commit.

    ``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_TOKEN`` and ``HF_ENDPOINT`` are the Hub library's and honoured.
    ``PARETO_STUDIO_MAX_DOWNLOAD`` is the most bytes that a model may still need; a hosted studio sets it.

    Args:
        trust_remote_code: also take the repository's Python files.

    Raises:
        ModelError: no such repository or revision, no access, weights only as pickle, too large, or no network and not cached.
    """
    name = f"{repo}@{revision}" if revision else repo
    if huggingface_hub.is_offline_mode():
        return from_cache(repo, revision, trust_remote_code, "HF_HUB_OFFLINE is set")
    try:
        found = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=_LOOK_UP_S)
    except errors.GatedRepoError as e:
        raise ModelError(f"{name} is gated: accept its terms on its Hub page and log in with `hf auth login`") from e
    except errors.RevisionNotFoundError as e:
        raise ModelError(
            f"the Hub repository {repo} has no revision {revision!r}; leave it out or name a branch, tag or commit"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise ModelError(
            f"the Hub has no repository {repo!r}, or it is private; check the name, or log in with `hf auth login`"
        ) from e
    except errors.HFValidationError as e:
        raise ModelError(f"{name!r} is not a Hub id; it looks like org/name or org/name@revision") from e
    except Exception as e:  # the HTTP library's own errors (two of them are in use): anything here means "not reachable"
        return from_cache(repo, revision, trust_remote_code, f"the Hub cannot be reached ({first_line(e)})")
    files = [s.rfilename for s in found.siblings or []]
    refuse_pickles(name, files)
    if any(f.endswith(".gguf") for f in files) and not any(f.endswith(".safetensors") for f in files):
        raise ModelError(
            f"{name} holds GGUF files only; take one with `hf download {repo} FILE.gguf` and give the path it prints"
        )
    progress("download", None, f"downloading {name} from the Hub")
    patterns = _patterns(trust_remote_code)
    if limit := os.environ.get(LIMIT_VARIABLE):
        _refuse_large(repo, revision, name, patterns, int(limit))
    try:  # by the name that was given, not by its commit: the Hub's cache then finds it again offline under this name
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, tqdm_class=_bar(name, progress), **patterns))
    except Exception as e:
        raise ModelError(f"the download of {name} stopped ({first_line(e)}); run it again, it goes on where it stopped") from e
    return folder, folder.name


def _refuse_large(repo: str, revision: str | None, name: str, patterns: dict[str, list[str]], limit: int) -> None:
    try:
        files = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            dry_run=True,
            allow_patterns=patterns["allow_patterns"],
            ignore_patterns=patterns["ignore_patterns"],
        )
    except Exception as e:
        raise ModelError(f"the size of {name} cannot be looked up ({first_line(e)}); try it again") from e
    missing = [f for f in files if f.will_download]
    total = sum(f.file_size or 0 for f in missing)
    if total > limit:
        raise ModelError(
            f"{name} is a download of {total / 1e6:,.1f} MB, but at most {limit / 1e6:,.1f} MB are allowed here; choose a smaller "
            "model, or run the studio on your own machine"
        )


def refuse_pickles(name: str, files: list[str]) -> None:
    """Refuse a model whose weights exist only as pickle files.

    Raises:
        ModelError: with the reason.
    """
    pickles = [f for f in files if f.endswith(PICKLES)]
    if pickles and not any(f.endswith((".safetensors", ".gguf")) for f in files):
        raise ModelError(
            f"{name} holds its weights only as pickle ({Path(pickles[0]).name}), which can run code when it is opened; "
            "the studio reads safetensors and GGUF only: give a copy saved with save_pretrained"
        )


def from_cache(
    repo: str, revision: str | None = None, trust_remote_code: bool = False, why: str = "fetching is off"
) -> tuple[Path, str]:
    """Snapshot and commit of a repository that was downloaded before.

    Args:
        why: why it is not downloaded now, for the sentence.

    Raises:
        ModelError: it is not on this machine.
    """
    name = f"{repo}@{revision}" if revision else repo
    try:
        folder = Path(
            huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True, **_patterns(trust_remote_code))
        )
    except errors.HFValidationError as e:
        raise ModelError(f"{name!r} is not a Hub id; it looks like org/name or org/name@revision") from e
    except errors.IncompleteSnapshotError as e:
        raise ModelError(
            f"{name} is only partly on this machine and {why}; connect and run it again, it goes on where it stopped"
        ) from e
    except (OSError, errors.LocalEntryNotFoundError) as e:
        again = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
        raise ModelError(f"{name} is not on this machine and {why}; connect and run it again, or run `{again}` first") from e
    return folder, folder.name


def _patterns(trust_remote_code: bool) -> dict[str, list[str]]:
    return {"allow_patterns": [*_WANTED, "*.py"] if trust_remote_code else _WANTED, "ignore_patterns": _UNWANTED}


def _bar(name: str, progress: Progress) -> type[Any]:
    """A tqdm class that draws nothing and hands on what it counts in bytes."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[type-arg,misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": None, "file": _Nowhere()})

        def update(self, n: float | None = 1) -> Any:
            answer = super().update(n)
            if self.unit == "B" and self.total:
                progress("download", min(1.0, self.n / self.total), f"{name}: {self.n / 1e6:.0f} of {self.total / 1e6:.0f} MB")
            return answer

    return Bar


class _Nowhere:
    """A text stream that forgets; it says that it is a terminal, or the bar would not count."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True
