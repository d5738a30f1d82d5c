"""Flash-LLM."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from studio_state.catalog import Card
from workers.mechanisms.exact_linear import held_matrix
from workers.mechanisms.linear import Replacement, bias_of, zeros_of
from workers.mechanisms.pruning import lowest
from workers.mechanisms.tiled_csl import TiledSparseLinear, break_even, check_kernel
from workers.mechanisms.weight_policy import Spot, WeightPolicy
from workers.methods import card, knob
from workers.session import Session


class FlashLLM(WeightPolicy):
    """Store only the weights that are not zero, tile by tile, and set the dense tiles up again to multiply: sparse to load, dense to compute.

    Xia et al. 2023, arXiv:2309.10285, by its abstract and the released format builder and tiling. A non-zero takes its own bytes
    and two for its place: in 16 bits a matrix shrinks to 2 (1 - s) of its size with a share s of zeros, in float32 to
    1.5 (1 - s). A map that an earlier policy pruned keeps that mask; any other one is pruned here by magnitude within the matrix. A
    map whose lists would not be smaller stays as it was.

    Deviations: the paper fine-tunes what is left, here nothing is trained. Each call sets the whole matrix up in memory
    and multiplies once, so products are those of the pruned dense matrix to the last bit, and decoding is slower than with it.
    The paper's kernel is for one GPU generation; ``product=triton`` is our own, which counts places where the paper scatters
    into shared memory. It gives the dense product in Triton's interpreter (float16) and compiles for an A100 and an H100, and has
    not run on a GPU yet.
    """

    card: ClassVar[Card] = card(
        id="flash-llm",
        title="Flash-LLM",
        paper="arXiv:2309.10285",
        stage="quantize",
        families=("llm", "vlm", "diffusion", "vit"),
        owns=("weights.format",),
        edits=("weights.mask",),
        effects={"weight_bytes": "down", "zero_weights": "up"},
        neutral={"sparsity": 0.0},
        alters_weights=True,
    )
    convolutions: ClassVar[bool] = True

    sparsity: float = knob(
        0.8,
        ge=0.0,
        le=0.99,
        help="share of weights set to zero in maps that no earlier policy pruned; 16-bit weights shrink above 0.5, float32 above 0.34; 0 = prune none",
    )
    product: Literal["unpack", "triton"] = knob(
        "unpack",
        help="set the matrix up, then a dense product; or tile by tile in a GPU kernel for up to 64 rows of 16-bit numbers",
    )

    def check(self, session: Session) -> None:
        """Whether the product asked for can run.

        Raises:
            SpecError: it cannot.
        """
        if self.product == "triton":
            check_kernel(session.device.type, session.dtype)

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """The lists of one linear map; None where they would not be smaller, and for the head, which is not pruned."""
        if spot.head:
            return None
        weight = held_matrix(source)
        if zeros_of(source) is None:
            gone = lowest(weight.abs().flatten()[None], int(self.sparsity * weight.numel()))
            weight = weight.masked_fill(gone.view_as(weight), 0)
        new = TiledSparseLinear.of(weight.contiguous(), bias_of(source), self.product == "triton")
        new.zeros = int((weight == 0).sum())
        books = new.ledger()
        return new if new.nbytes() - books["bias"] < weight.numel() * weight.element_size() else None

    def weight_factor(self, bits: int) -> float:
        """Numbers and places of what its own knob leaves; never more than the dense form, which then stays."""
        return min(1.0, (bits + 16) / bits * (1 - self.sparsity))

    def why_idle(self, session: Session) -> str:
        """Nothing would get smaller."""
        share = break_even(session.dtype.itemsize)
        return (
            f"Flash-LLM stored no map as lists, as none would be smaller: in {str(session.dtype).removeprefix('torch.')} more than "
            f"{share:.0%} of a map's weights must be zero; raise sparsity here or in the pruner before it"
        )
