"""Safetensors files on disk: which there are, whether they are whole, and what they hold, without reading weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from studio_state.errors import ModelError
from workers.models.hub import refuse_pickles

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: ``dtype`` in safetensors' words (``BF16``), its shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_folder(name: str, folder: Path) -> dict[str, StoredTensor]:
    """Headers of all safetensors files from which transformers would load this folder.

    Args:
        name: what the user asked for, for the sentence.

    Raises:
        ModelError: no weights, only pickles, a missing shard, a truncated or damaged file.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files(name, folder):
        tensors.update(read_header(file))
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file, after checking that it is as long as its header says.

    Raises:
        ModelError: truncated or damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise ModelError(
                f"{file} is truncated or not a safetensors file: it has {size} bytes, "
                "too few for its header; copy or download it again"
            )
        raw = f.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {
            key: StoredTensor(
                str(t["dtype"]), tuple(int(n) for n in t["shape"]), int(t["data_offsets"][1]) - int(t["data_offsets"][0])
            )
            for key, t in header.items()
        }
        end = max((int(t["data_offsets"][1]) for t in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise ModelError(f"{file} is not a safetensors file, or its header is damaged; copy or download it again") from e
    expected = _LENGTH_BYTES + length + end
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise ModelError(f"{file} is {what}: it has {size:,} bytes, its header says {expected:,}; copy or download it again")
    return tensors


def files(name: str, folder: Path) -> list[Path]:
    """The safetensors files from which transformers would load this folder.

    Raises:
        ModelError: no weights, only pickles, or a missing shard.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ModelError(f"{index} is damaged; copy or download it again") from e
        missing = [s for s in shards if not (folder / s).is_file()]
        if missing:
            raise ModelError(
                f"{name} lacks {len(missing)} of its {len(shards)} weight files (first: {missing[0]}); "
                "copy or download them again"
            )
        return [folder / s for s in shards]
    present = sorted(p.name for p in folder.iterdir())
    refuse_pickles(name, present)
    others = [p for p in present if p.endswith(".safetensors")]
    hint = f"it has {', '.join(others)}, expected {_SINGLE}" if others else f"expected {_SINGLE} or {_INDEX}"
    raise ModelError(f"{name} has no weights that can be loaded: {hint}")
