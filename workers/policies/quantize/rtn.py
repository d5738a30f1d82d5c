"""Weight-only round-to-nearest quantization."""

from __future__ import annotations

from typing import ClassVar

from studio_state.catalog import Card
from workers.mechanisms.rounding import GroupedPolicy
from workers.mechanisms.weight_policy import QUANTIZES
from workers.methods import card


class RoundToNearest(GroupedPolicy):
    """Store linear weights in 2 to 8 bits, each rounded to the nearest point of its grid; activations stay floats.

    The baseline of the quantization literature (no calibration): 8 bits with one symmetric scale a
    row, or fewer with scale and zero point a group of inputs; groups that hold exact zeros are coded
    symmetrically, so a pruning mask survives. Scales are bfloat16. On the CPU decode with 8 and 4 bits runs
    in kernels of our own where they can be compiled (AVX-512 VNNI), which round activations to 16 bits by group
    to multiply integers, else on PyTorch's weight-only kernels, which round them to bfloat16, more coarsely;
    other widths are unpacked at every call, which is slower than not to quantize at all. An embedding tied to
    the output head is read from the head's packed table, which is stored once. Convolutions keep packed weights
    too, unpacked at every call.
    """

    card: ClassVar[Card] = card(
        id="rtn",
        title="Round-to-nearest",
        hopes={"decode_tokens_per_s": "up"},
        not_neutral_because="every setting rounds; each weight moves by at most half a step of its grid",
        **QUANTIZES,
    )
    convolutions: ClassVar[bool] = True
