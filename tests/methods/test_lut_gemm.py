"""LUT-GEMM: binary coding and look-ups, against enumerated sums, hand-worked groups and round-to-nearest."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from studio_state.errors import SpecError
from tests import tiny
from tests.methods.driving import attached, forced, make_session, prompt
from workers.mechanisms import binary_codes, lookup_tables, packing
from workers.mechanisms.levels import Line, nearest
from workers.mechanisms.lut_linear import TABLE_ROWS, BinaryCodeLinear
from workers.mechanisms.packed_linear import BitPlaneLinear
from workers.mechanisms.weight_policy import Spot, build, weight_metrics
from workers.policies.prune.magnitude import Magnitude
from workers.policies.quantize.lut_gemm import LutGemm
from workers.policies.quantize.rtn import RoundToNearest


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(source: nn.Linear, **knobs: object) -> BinaryCodeLinear:
    new = build(LutGemm(**knobs), source, Spot("map"))  # type: ignore[arg-type]
    assert isinstance(new, BinaryCodeLinear)
    return new


def linear(rows: int, width: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, rows, bias=bias).requires_grad_(False)


def test_a_table_holds_every_signed_sum() -> None:
    x = torch.tensor([[1.0, 2, 4, 8, 16, 32, 64, 128, -3, 0, 5, 7, 1, 1, 2, 9]], dtype=torch.float64)
    table = lookup_tables.tables(x, 8)
    assert table.shape == (1, 2, 256)
    for run in range(2):
        part = x[0, 8 * run : 8 * run + 8]
        for pattern in range(256):
            signs = torch.tensor([1.0 if pattern >> j & 1 else -1.0 for j in range(8)], dtype=torch.float64)
            assert table[0, run, pattern] == (signs * part).sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("offset", [True, False])
def test_in_whole_numbers_a_look_up_equals_the_product(bits: int, offset: bool) -> None:
    """Powers of two as scales, whole activations, float64: no rounding anywhere, so equality to the last bit."""
    planes = packing.pack_planes(torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8), bits)
    grid = 2.0 ** torch.randint(-3, 4, (2, 5, bits + offset))
    module = BinaryCodeLinear(planes, grid.bfloat16(), None, True)
    x = torch.randint(-50, 50, (3, 64), dtype=torch.float64)
    assert torch.equal(module(x), x @ module.matrix().double().T)


@pytest.mark.parametrize("knobs", [{}, {"offset": True}, {"fit": "uniform"}, {"fit": "greedy", "bits": 1}])
def test_a_look_up_equals_the_unpacked_product_within_rounding(knobs: dict[str, object]) -> None:
    source = linear(40, 96, bias=True)
    module, plain = made(source, **knobs), made(source, kernel="unpack", **knobs)
    assert torch.equal(module.matrix(), plain.matrix())
    for rows in (1, TABLE_ROWS, TABLE_ROWS + 1):
        x = torch.randn(rows, 96)
        exact = x.double() @ module.matrix().double().T + module.bias.double()
        for one in (module, plain):
            assert (one(x) - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert module(torch.randn(2, 3, 96)).shape == (2, 3, 40)
    assert made(linear(40, 96), **knobs)(torch.randn(2, 96).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_uniform_is_the_very_matrix_of_round_to_nearest(bits: int) -> None:
    weight = torch.randn(48, 96) * torch.linspace(0.01, 2, 48)[:, None] + 0.3
    weight[5] = 0
    codes, grid = packing.round_groups(weight, 32, bits)
    theirs = BitPlaneLinear.stored(codes, grid, bits, None)
    source = linear(48, 96)
    source.weight.copy_(weight)
    mine = made(source, bits=bits, fit="uniform")
    assert torch.equal(mine.planes, theirs.planes)
    assert torch.equal(mine.matrix(), theirs.matrix())


def test_greedy_by_hand() -> None:
    values = torch.tensor([[3.0, -1.0, 2.0, -6.0]])
    (alphas, z), (one, _) = binary_codes.greedy(values, 2), binary_codes.greedy(values, 1)
    assert one.tolist() == [[3.0]]  # the mean size; the code is the sign
    assert z is None
    left = [0.0, 2.0, -1.0, -3.0]  # 3 - 3, -1 + 3, 2 - 3, -6 + 3
    assert alphas.tolist() == [[sum(map(abs, left)) / 4, 3.0]]
    codes, grid = binary_codes.fit(values.repeat(2, 1), 4, 1, rounds=0)
    assert grid.flatten().tolist() == [3.0, 3.0]
    assert codes.tolist() == [[1, 0, 1, 0]] * 2


def test_the_nearest_sum_is_the_nearest_of_all() -> None:
    alphas, z = torch.rand(6, 3), torch.randn(6, 1)
    values = torch.randn(6, 50)
    points = binary_codes.levels(alphas, z)
    listed = [[sum(s * a for s, a in zip(reversed(p), row, strict=True)) for p in product((-1, 1), repeat=3)] for row in alphas]
    assert torch.allclose(points, torch.tensor(listed) + z, atol=1e-6)
    wanted = (values[..., None] - points[:, None]).abs().min(2).values
    found = (points.gather(1, nearest(values, points).long()) - values).abs()
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("make", [torch.randn, torch.rand, torch.zeros], ids=["normal", "one-sided", "zero"])
def test_no_round_of_alternating_raises_the_error_of_any_group(offset: bool, make: object) -> None:
    values = make(64, 32)  # type: ignore[operator]
    line = Line.of(values)
    alphas, z = binary_codes.greedy(values, 3, offset)

    def error() -> Tensor:  # by distances to every sum
        points = binary_codes.levels(alphas, z).double()
        return (values.double()[..., None] - points[:, None]).abs().min(2).values.square().sum(1, keepdim=True)

    for _ in range(binary_codes.ROUNDS):
        before = error()
        assert torch.allclose(binary_codes.error(line, alphas, z), before, rtol=1e-6, atol=1e-9)
        alphas, z = binary_codes.refined(line, alphas, z)
        assert bool((error() <= before + 1e-12).all())


def test_weights_that_are_such_sums_are_found_exactly() -> None:
    codes = torch.arange(8, dtype=torch.uint8).repeat(4)[None]
    grid = torch.tensor([[[0.25, 1.0, 4.0]]])
    weight = BinaryCodeLinear(packing.pack_planes(codes, 3), grid.bfloat16(), None, True).matrix()
    found, numbers = binary_codes.fit(weight, 32, 3)
    assert torch.equal(found, codes)
    assert torch.equal(numbers.float(), grid)


def test_alternating_is_closer_than_greedy_and_at_two_and_three_bits_than_rounding() -> None:
    """The card's finding: on normal weights plain rounding wins at 4 bits, so nothing is claimed there."""
    source = linear(64, 256)
    nn.init.normal_(source.weight, std=0.02)

    def error(matrix: Tensor) -> float:
        return float((matrix - source.weight).square().mean())

    for bits in (2, 3, 4):
        greedy, best = (error(made(source, bits=bits, fit=f, group_size=128).matrix()) for f in ("greedy", "alternating"))
        rounded = error(made(source, bits=bits, fit="uniform", group_size=128).matrix())
        assert best < greedy
        assert (best < rounded) == (bits < 4)


@pytest.mark.parametrize(("bits", "group", "offset"), [(1, 32, False), (3, 32, True), (4, 64, False)])
def test_bytes_follow_the_formula(bits: int, group: int, offset: bool) -> None:
    module = made(linear(40, 128, bias=True), bits=bits, group_size=group, offset=offset)
    codes, scales = bits * 40 * 128 // 8, 2 * (bits + offset) * 40 * 128 // group
    assert module.ledger() == {"codes": codes, "scales": scales, "padding": 0, "bias": 160}
    assert module.nbytes() == codes + scales + 160
    assert module.bits == bits
    factor = LutGemm(bits=bits, group_size=group, offset=offset).weight_factor(16)
    assert (codes + scales) / (2 * 40 * 128) == pytest.approx(factor)


def test_fewer_operations_as_counted_on_the_paper_s_shape() -> None:
    """Card: 12288 x 12288 takes 3.96, 2.65 and 1.99 times fewer operations with 2, 3 and 4 bits."""
    for bits, fewer in ((2, 3.96), (3, 2.65), (4, 1.99)):
        empty = torch.empty(bits, 12288, 1536, dtype=torch.uint8, device="meta")
        module = BinaryCodeLinear(empty, torch.empty(96, 12288, bits, device="meta"), None, True)
        mine, plain = module.figures()["table_operations"]
        assert plain == 12288**2
        assert mine == (256 * 12288 + bits * 12288 * 12288) / 8
        assert plain / mine == pytest.approx(fewer, abs=0.01)


def test_fused_parts_give_the_same_numbers_and_unlike_ones_do_not_fuse() -> None:
    parts = [made(linear(n, 64)) for n in (24, 40)]
    whole = BinaryCodeLinear.fuse(parts)
    assert whole is not None
    assert torch.equal(whole.matrix(), torch.cat([p.matrix() for p in parts]))
    x = torch.randn(1, 64)
    assert torch.allclose(whole(x), torch.cat([p(x) for p in parts], -1), atol=1e-6)
    assert torch.equal(whole.rows(torch.tensor([30, 2])), whole.matrix()[[30, 2]])
    for other in ({"offset": True}, {"kernel": "unpack"}, {"bits": 2}, {"group_size": 64}):
        assert BinaryCodeLinear.fuse([parts[0], made(linear(40, 64), **other)]) is None


def test_the_model_computes_the_same_by_tables_and_unpacked_and_as_rounding_does() -> None:
    session = make_session(tiny.llama_folder())
    scores = []
    for policy in (
        LutGemm(head="same"),
        LutGemm(head="same", kernel="unpack"),
        LutGemm(head="same", fit="uniform"),
        RoundToNearest(bits=3, head="same"),
    ):
        with attached(session, policy):
            scores.append(forced(session, prompt(24), prompt(4, seed=5)))
            told = weight_metrics(session)
        assert ("table_operations" in told) == (scores[1:] == [] or len(scores) == 3)
    assert torch.allclose(scores[0], scores[1], atol=1e-4)
    assert torch.allclose(scores[2], scores[3], atol=1e-4)
    assert not torch.allclose(scores[0], scores[2], atol=1e-2)


def test_pruned_weights_stay_zero_on_a_uniform_grid_only() -> None:
    session = make_session()
    told = {}
    for fit in ("uniform", "alternating"):
        with attached(session, Magnitude(sparsity=0.5, scope="row"), LutGemm(fit=fit)):
            told[fit] = weight_metrics(session)["zero_weights"]
    assert told["alternating"] < 0.4 < 0.5 <= told["uniform"]


def test_a_group_that_does_not_fit_is_refused() -> None:
    with (
        pytest.raises(SpecError, match="group_size = 128 does not divide the width 64"),
        attached(make_session(), LutGemm(group_size=128)),
    ):
        pass
