"""From what a person typed to a folder with a checked model: zoo id, Hub id, folder or GGUF file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig

from studio_state.errors import ModelError
from studio_state.problems import nearest
from studio_state.zoo import InRepo, LocalFolder, ZooEntry, entries, find, location
from workers.models import gguf_file, hub, pipeline_folder, weights_files
from workers.models.gguf_file import GgufFacts
from workers.models.packed_recipe import PackedRecipe, read_recipe
from workers.models.talk import Progress, first_line, silent
from workers.models.weights_files import StoredTensor
from workers.models.zoo import fetch as fetch_entry


@dataclass(frozen=True)
class Resolved:
    """A model that lies on this machine, whole as far as can be seen without reading its weights.

    Attributes:
        name: what the user asked for.
        path: folder of the model.
        gguf_file: name of the GGUF file inside it, or None for safetensors.
        entry: its zoo entry, if it has one.
        revision: commit of the Hub, or empty.
        config: transformers' config; None for a diffusion pipeline.
        raw: ``config.json`` (or ``model_index.json``) as written.
        tensors: headers of the safetensors files.
        gguf: header of the GGUF file.
        trust_remote_code: the repository's own Python code may run.
        packed: recipe of an exported model, whose weights are packed; None for all others.
    """

    name: str
    path: Path
    config: Any
    raw: dict[str, Any]
    gguf_file: str | None = None
    entry: ZooEntry | None = None
    revision: str = ""
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    gguf: GgufFacts | None = None
    trust_remote_code: bool = False
    packed: PackedRecipe | None = None

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        if self.entry:
            return self.entry.source.place()
        return f"Hub {self.name}" if self.revision else f"folder {self.path}"


def resolve(name: str, *, fetch: bool = True, trust_remote_code: bool = False, progress: Progress = silent) -> Resolved:
    """Find a model, fetch it if need be, and check everything that can be checked before its weights load.

    Args:
        name: zoo id, Hub id ``org/name[@revision]``, folder (safetensors, or with one GGUF file) or GGUF file.
        fetch: False = only what is on this machine already.
        trust_remote_code: accept architectures that come as Python code with the model.
        progress: see :data:`workers.models.talk.Progress`.

    Raises:
        ModelError: not found, not reachable, incomplete, damaged, pickle, or of an unknown architecture.
    """
    name = name.strip()
    if not name:
        raise ModelError("no model was given; give a zoo id, a Hub id org/name, a model folder or a GGUF file")
    entry = find(name)
    if entry:
        return _read(name, _entry_folder(entry, fetch, progress), entry=entry, trust=trust_remote_code)
    path = Path(name).expanduser()
    if path.is_dir():
        return _read(name, path.absolute(), trust=trust_remote_code)
    if path.is_file():
        return _read_file(name, path.absolute())
    match = hub.HUB_ID.match(name)
    if match and not name.lower().endswith((".gguf", ".safetensors", *hub.PICKLES)):
        if not fetch:
            folder, commit = hub.from_cache(match["repo"], match["revision"], trust_remote_code)
        else:
            folder, commit = hub.download(match["repo"], match["revision"], trust_remote_code, progress)
        return _read(name, folder, revision=commit, trust=trust_remote_code)
    raise ModelError(_unknown(name))


def _entry_folder(entry: ZooEntry, fetch: bool, progress: Progress) -> Path:
    if fetch:
        return fetch_entry(entry, progress)
    folder = location(entry)
    if folder is None:
        local = isinstance(entry.source, InRepo | LocalFolder)
        raise ModelError(
            f"model {entry.id} is not on this machine; "
            + (f"put back the {entry.source.place()}" if local else f"run `pareto-studio zoo fetch {entry.id}`")
        )
    return folder


def _unknown(name: str) -> str:
    ids = [e.id for e in entries()]
    if os.sep in name or name.startswith(("~", ".")) or name.lower().endswith((".gguf", ".safetensors", *hub.PICKLES)):
        what, hint = "file or folder", ""
    else:
        what, hint = "model", nearest(name, ids)
    return (
        f"there is no {what} {name!r}; {hint}allowed: a zoo id ({', '.join(ids)}), a Hub id org/name[@revision], "
        "an existing model folder or GGUF file"
    )


def _read_file(name: str, file: Path) -> Resolved:
    if file.suffix.lower() in hub.PICKLES:
        hub.refuse_pickles(name, [file.name])
    if file.suffix.lower() == ".safetensors":
        raise ModelError(f"{name} is a single weights file; give the folder that holds it together with its config.json")
    return _read_gguf(name, file)


def _read(name: str, folder: Path, *, entry: ZooEntry | None = None, revision: str = "", trust: bool = False) -> Resolved:
    """A checked model folder."""
    packed = read_recipe(name, folder)
    if (folder / pipeline_folder.INDEX).is_file():
        index = _json(folder / pipeline_folder.INDEX)
        parts = pipeline_folder.components(name, index)
        stored = weights_files.read_folder(name, folder) if packed else pipeline_folder.read_tensors(name, folder, parts)
        return Resolved(name, folder, None, index, None, entry, revision, stored, None, trust, packed)
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and not any(folder.glob("*.safetensors")):
        if len(ggufs) > 1:
            raise ModelError(
                f"{name} holds {len(ggufs)} GGUF files ({', '.join(g.name for g in ggufs[:4])}); give the path of one of them"
            )
        return _read_gguf(name, ggufs[0], entry)
    if not (folder / "config.json").is_file():
        hub.refuse_pickles(name, [p.name for p in folder.iterdir()])
        raise ModelError(
            f"{name} has no config.json, so it is no model folder; give a folder saved with save_pretrained, or a GGUF file"
        )
    raw = _json(folder / "config.json")
    _check_architecture(name, raw, trust)
    tensors = weights_files.read_folder(name, folder)
    return Resolved(name, folder, _config(name, folder, raw, trust), raw, None, entry, revision, tensors, None, trust, packed)


def _read_gguf(name: str, file: Path, entry: ZooEntry | None = None) -> Resolved:
    facts = gguf_file.read_facts(file)
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except (ValueError, KeyError, OSError) as e:
        raise ModelError(
            f"the GGUF file {file.name} cannot be read by transformers {transformers.__version__}: {first_line(e)}"
        ) from e
    return Resolved(name, file.parent, config, config.to_dict(), file.name, entry, gguf=facts)


def _check_architecture(name: str, raw: dict[str, Any], trust: bool) -> None:
    """Refuse what only the model's own code could load, and what nothing here can."""
    kind, known_class = raw.get("model_type"), True
    architectures = raw.get("architectures") or []
    if architectures:
        known_class = hasattr(transformers, str(architectures[0]))
    if "auto_map" in raw and not (kind in CONFIG_MAPPING and known_class):
        if not trust:
            raise ModelError(
                f"{name} brings its own Python code for {architectures[0] if architectures else kind}, which is not run; "
                "if you trust its authors set trust_remote_code, else choose an architecture that transformers knows"
            )
    elif not kind:
        raise ModelError(
            f"the config.json of {name} names no model_type, so its architecture is unknown; "
            "take the model's original config.json"
        )
    elif kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{name} has the architecture {kind!r}, which transformers {transformers.__version__} does not know; "
            "choose another model"
        )
    elif not known_class:
        raise ModelError(
            f"{name} names the class {architectures[0]!r}, which transformers {transformers.__version__} does not have; "
            "choose another model"
        )


def _config(name: str, folder: Path, raw: dict[str, Any], trust: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    except Exception as e:  # strict config validation has its own error types, remote code any
        raise ModelError(f"the config.json of {name} ({raw.get('model_type')}) is not valid: {first_line(e)}") from e


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise ModelError(f"{file} cannot be read as JSON ({first_line(e)}); copy or download it again") from e
    if not isinstance(data, dict):
        raise ModelError(f"{file} does not hold a JSON object; copy or download it again")
    return data
