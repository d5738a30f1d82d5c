"""``pareto.json``: what an exported model was made of, and how its modules are made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from studio_state.errors import ModelError
from studio_state.experiment import ModelInfo
from workers.mechanisms.weight_ledger import TOLERANCE
from workers.models.packed_modules import Written

RECIPE = "pareto.json"
FORMAT = 1


class Bytes(BaseModel):
    """The byte table of an export.

    Attributes:
        base: all weights of the base model in the number format of the export.
        theoretical: bits of a code times the weights of each replaced map, everything else as it is.
        scales, padding: what the formats take beside their codes.
        in_memory: what the packed model holds; ``computed``: the part of it that no file keeps (rotary
            frequencies, what a library's packed object adds).
        on_disk: the weights file; ``header``: the names and places of its tensors, at its beginning.
    """

    model_config = ConfigDict(extra="forbid")
    base: int
    theoretical: int
    scales: int
    padding: int
    in_memory: int
    computed: int
    on_disk: int
    header: int

    def complaint(self) -> str:
        """In what the three counts disagree, in plain words; empty where they are the same within 2 %."""
        stored = self.in_memory - self.computed
        sums = {
            f"bits, scales and padding make {self.theoretical + self.scales + self.padding:,} bytes": (
                self.theoretical + self.scales + self.padding - self.in_memory
            ),
            f"the file holds {self.on_disk - self.header:,} bytes of weights": self.on_disk - self.header - stored,
        }
        wrong = [
            f"{what}, the model in memory {self.in_memory:,}"
            for what, off in sums.items()
            if abs(off) > TOLERANCE * self.in_memory
        ]
        return "; ".join(wrong) and f"the byte counts disagree: {'; '.join(wrong)}"


class PackedRecipe(BaseModel):
    """Everything that stands beside the weights.

    Attributes:
        info: what is known of the base model; its sizes, family and traits are those of the packed one too.
        pipeline: the policies that made it, in the order in which they acted.
        dtype: number format of what no policy replaced.
        parameters: weights that are left, packed or not; fewer than the base's where experts were taken out.
        dtypes, devices: what the policies' operators are bound to; empty = nothing.
        modules: qualified name -> replaced module.
        complaint: in what the byte counts disagree, if they do.
        experts: qualified names of a router and its experts, for each mixture that lost some: the numbers of those that stayed.
        tied: parameter -> the parameter that it is.
    """

    model_config = ConfigDict(extra="forbid")
    format: int = FORMAT
    info: ModelInfo
    pipeline: str
    dtype: str
    parameters: int
    dtypes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    bytes: Bytes
    complaint: str = ""
    experts: dict[str, list[int]] = Field(default_factory=dict)
    tied: dict[str, str] = Field(default_factory=dict)
    modules: dict[str, Written]

    def text(self) -> str:
        """What was packed of what, in a few words."""
        return f"{self.pipeline} of {self.info.name}"


def read_recipe(name: str, folder: Path) -> PackedRecipe | None:
    """The recipe of a folder; None where it is no exported model.

    Raises:
        ModelError: it cannot be read, or is of a later version.
    """
    file = folder / RECIPE
    if not file.is_file():
        return None
    try:
        recipe = PackedRecipe.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as e:
        raise ModelError(f"the recipe {RECIPE} of {name} is damaged ({reason(e)}); copy or export the model again") from e
    if recipe.format != FORMAT:
        raise ModelError(
            f"the recipe {RECIPE} of {name} has the format {recipe.format}, this version of Pareto Studio reads {FORMAT}; "
            "install the version that it was exported with, or export the model again"
        )
    return recipe


def reason(error: Exception) -> str:
    """What is wrong, short enough for a sentence."""
    if isinstance(error, ValidationError):
        first: Any = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
    return str(error)
