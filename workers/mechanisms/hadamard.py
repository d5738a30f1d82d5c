"""Randomized Hadamard transforms of a linear map's input: orthogonal, so the map computes the same, and outliers are spread.

A width K = 2^a is transformed by Sylvester's matrix. K = 2^a h with h not a power of two takes a Hadamard matrix of h, where
Paley's construction has one, times Sylvester's (576 = 16 x 36, 1536 = 128 x 12); other widths are cut into blocks of their largest
power of two, each transformed by itself. Sylvester's part is split into matrices of at most :data:`LARGEST`, so that the
transform is a few small products.

Shapes: K inputs, N output rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from math import isqrt, prod
from typing import Any, Self

import torch
from torch import Tensor

from workers.mechanisms.linear import Replacement, join_bias
from workers.mechanisms.scaled_input import TransformedInput
from workers.mechanisms.token_rounding import by_token

LARGEST = 64  # one factor of a power of two
LARGEST_PALEY = 256  # beyond, its dense product would cost as much as the map itself
FLOAT_BITS = 16  # from so many bits on activations are not rounded


def sizes(width: int) -> tuple[int, ...]:
    """Orders of the Hadamard matrices whose Kronecker product transforms an input of K; their product divides K."""
    two = width & -width
    odd, power = width // two, two.bit_length() - 1
    orders = [odd << j for j in range(2, power + 1) if odd > 1 and odd << j <= LARGEST_PALEY]
    paley = next((h for h in orders if _paley_prime(h)), 1)
    rest = two if paley == 1 else width // paley
    parts = -(-(rest.bit_length() - 1) // (LARGEST.bit_length() - 1))
    exponents = [(rest.bit_length() - 1 + i) // parts for i in range(parts)]
    return (*([paley] if paley > 1 else []), *(1 << e for e in exponents)) or (1,)


@cache
def hadamard(order: int) -> Tensor:
    """A matrix of 1 and -1 whose rows are orthogonal, float64 [n, n]: Sylvester's for powers of two, else Paley's.

    Raises:
        ValueError: neither construction knows the order.
    """
    if order & (order - 1) == 0:
        whole = torch.ones(1, 1, dtype=torch.float64)
        while len(whole) < order:
            whole = torch.kron(whole, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
        return whole
    q = _paley_prime(order)
    if not q:
        raise ValueError(f"no Hadamard matrix of order {order} is known here: neither a power of two nor of Paley's kinds")
    squares = {i * i % q for i in range(1, q)}
    residue = torch.tensor([0.0 if i == 0 else 1.0 if i in squares else -1.0 for i in range(q)], dtype=torch.float64)
    place = torch.arange(q)
    conference = torch.ones(q + 1, q + 1, dtype=torch.float64)
    conference[1:, 1:] = residue[(place[:, None] - place) % q]
    conference[0, 0] = 0
    one = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:  # skew-symmetric
        conference[1:, 0] = -1
        return one + conference
    return torch.kron(conference, hadamard(2)) + torch.kron(one, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64))


def _paley_prime(order: int) -> int:
    """The prime q of order = q + 1 with q = 3 mod 4, or of order = 2 (q + 1) with q = 1 mod 4; 0 if there is none."""
    for q, rest in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == rest and q > 2 and all(q % d for d in range(2, isqrt(q) + 1)):
            return q
    return 0


@cache
def _factors(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Orthonormal factors; constants of the program, shared by all maps of a width."""
    return tuple((hadamard(n) / n**0.5).to(device, dtype) for n in sizes(width))


def transform(x: Tensor, back: bool = False) -> Tensor:
    """Rows [..., K] times the orthonormal transform, or times its transpose to go back; in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    factors = _factors(x.shape[-1], dtype, x.device)
    y, right = x.to(dtype).reshape(-1), prod(len(f) for f in factors)
    for factor in factors:
        right //= len(factor)
        f = factor if back else factor.T
        y = f @ y.view(-1, len(f), right) if right > 1 else y.view(-1, len(f)) @ f.T
    return y.reshape(x.shape)


def signs(width: int, seed: int) -> Tensor:
    """Random signs of the inputs: int8 [K] of 1 and -1, equal for equal widths and seeds."""
    draw = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed))
    return (2 * draw - 1).to(torch.int8)


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """Rows [..., K] times the randomized transform: signs [K] first, then :func:`transform`."""
    return transform(x * signs.to(x.dtype))


class RotatedInput(TransformedInput):
    """A linear map behind a rotation of its input, rounded token by token if wanted; it computes the rotation at every call.

    The inner map is given the whole numbers of the rounded activations, which bfloat16 holds exactly, and their step
    multiplies its output.

    Args:
        inner: holds the rotated weights ``rotate(W)``, without a bias.
        signs: int8 [K], of the rotation.
        activation_bits: of the rounded activations; 16 = not rounded.
        clip: share of a token's largest value that its grid spans.
        bias: [N].
    """

    signs: Tensor

    def __init__(self, inner: Replacement, signs: Tensor, activation_bits: int, clip: float, bias: Tensor | None):
        super().__init__(inner, bias)
        self.register_buffer("signs", signs)
        self.activation_bits, self.clip = activation_bits, clip

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        turned = self.transform(x)
        if self.activation_bits >= FLOAT_BITS:
            y: Tensor = self.inner(turned)
        else:
            codes, step = by_token(turned, self.activation_bits, self.clip)
            y = self.inner(codes.to(x.dtype)) * step
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def transform(self, x: Tensor) -> Tensor:
        """The rotated input, in x's dtype."""
        return rotate(x, self.signs).to(x.dtype)

    def back(self, weight: Tensor) -> Tensor:
        """Rows turned back."""
        return transform(weight.float(), back=True) * self.signs

    def own(self) -> Hashable:
        """Signs, and how activations are rounded."""
        return (tuple(self.signs.tolist()), self.activation_bits, self.clip)

    def around(self, inner: Replacement, bias: Tensor | None = None) -> Self:
        """The same rotation around other weights; the bias stays its own unless another is given."""
        return type(self)(inner, self.signs, self.activation_bits, self.clip, self.bias if bias is None else bias)

    @classmethod
    def joined(cls, parts: Sequence[Any]) -> RotatedInput:
        """The inner rows of all parts behind one rotation."""
        inner = type(parts[0].inner).joined([p.inner for p in parts])
        whole: RotatedInput = parts[0].around(inner, join_bias(parts))
        return whole
