"""The survey's switches: each against its formula, round-to-nearest as one of their settings, and the order of their errors."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor, nn

from studio_state.errors import SpecError
from tests.methods.driving import attached, make_session
from workers.mechanisms import levels, packing, ranges
from workers.mechanisms.levels import CodebookLinear, Line
from workers.mechanisms.packed_linear import Int4Linear, Int8Linear
from workers.mechanisms.weight_policy import Spot, build, weight_metrics
from workers.policies.prune.magnitude import Magnitude
from workers.policies.quantize.quantizer import Quantizer
from workers.policies.quantize.rtn import RoundToNearest


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def source(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    made.weight.copy_(weight)
    return made


def matrix(weight: Tensor, **knobs: object) -> Tensor:
    new = build(Quantizer(**knobs), source(weight), Spot("map"))  # type: ignore[arg-type]
    return new.matrix()  # type: ignore[union-attr, operator]


def error(weight: Tensor, **knobs: object) -> float:
    return float((matrix(weight, **knobs) - weight).square().mean())


@pytest.mark.parametrize("bits", range(2, 8))
def test_by_group_over_the_range_it_is_round_to_nearest(bits: int) -> None:
    weight = torch.randn(48, 96) + 0.1
    theirs = build(RoundToNearest(bits=bits), source(weight), Spot("map"))
    mine = build(Quantizer(bits=bits, per="group", clip="range"), source(weight), Spot("map"))
    assert type(mine) is type(theirs)
    assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), theirs.buffers(), strict=True))  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetry", ["full", "restricted"])
@pytest.mark.parametrize("per", ["matrix", "row", "group"])
def test_symmetric_grids_follow_the_survey_s_formulas(bits: int, symmetry: str, per: str) -> None:
    weight = torch.randn(6, 64)
    view = {"matrix": weight.reshape(1, 1, -1), "row": weight[:, None], "group": weight.unflatten(1, (2, 32))}[per]
    largest = view.abs().amax(2, keepdim=True)
    step = (2 * largest / (2**bits - 1) if symmetry == "full" else largest / (2 ** (bits - 1) - 1)).bfloat16().float()
    low = -(2 ** (bits - 1)) + (symmetry == "restricted")
    wanted = (view / step).round().clamp(low, 2 ** (bits - 1) - 1) * step
    found = matrix(weight, bits=bits, symmetry=symmetry, per=per, clip="range")
    assert torch.allclose(found, wanted.view_as(weight), rtol=1e-6)
    half = (step / 2 * 1.01).expand_as(view).reshape(weight.shape)
    assert bool(((found - weight).abs() <= half + 2**-8 * largest.max()).all())  # the step was rounded to bfloat16


@pytest.mark.parametrize("symmetry", ["asymmetric", "full", "restricted"])
def test_what_is_on_a_grid_stays(symmetry: ranges.Symmetry) -> None:
    weight = torch.randn(16, 64)
    grid = ranges.least_error(weight, 32, 4, symmetry)
    codes = ranges.coded(weight, grid, 4, symmetry)
    assert torch.equal(ranges.coded(packing.dequantise(codes.T, grid, 4).T, grid, 4, symmetry), codes)
    table = levels.clustered(weight, 16)
    places = levels.nearest(weight, table)
    assert torch.equal(levels.nearest(table.gather(1, places.long()), table), places)


def test_a_grid_for_fewer_weights_is_closer() -> None:
    weight = torch.randn(64, 256) * torch.linspace(0.1, 2, 64)[:, None] * torch.linspace(0.3, 1, 256)
    for bits in (2, 3, 4, 8):
        for clip in ("range", "mse"):
            errors = [error(weight, bits=bits, per=per, clip=clip) for per in ("group", "row", "matrix")]
            assert errors == sorted(errors)


def test_one_sided_weights_want_an_asymmetric_grid() -> None:
    weight = torch.rand(16, 64) + 0.5
    assert error(weight) < min(error(weight, symmetry="full"), error(weight, symmetry="restricted"))


def test_the_best_share_of_the_range_is_the_best_of_those_tried() -> None:
    weight = torch.randn(4, 64)
    tried = []
    for shrink in ranges.SHRINKS:
        grid = ranges.spanning(weight, 32, 3, "restricted", shrink)
        codes = ranges.coded(weight, grid, 3, "restricted").float()
        values = (codes - 4) * grid[..., 0].float().T.repeat_interleave(32, 1)
        tried.append((values - weight).square().unflatten(1, (2, 32)).sum(2))
    found = (matrix(weight, bits=3, per="group", symmetry="restricted") - weight).square().unflatten(1, (2, 32)).sum(2)
    assert torch.allclose(found, torch.stack(tried).min(0).values, rtol=1e-5)
    for bits in (2, 3, 4):
        assert error(torch.randn(16, 256), bits=bits) < error(torch.randn(16, 256), bits=bits, clip="range")


def test_percentiles_leave_one_in_a_thousand_out_on_each_side() -> None:
    weight = torch.arange(4000.0)[None] - 2000
    inside = ranges.without_tails(weight, 4000)
    assert (float(inside.min()), float(inside.max())) == (-1996.0, 1995.0)
    assert torch.equal(ranges.without_tails(weight[:, :64], 32), weight[:, :64])
    outlier = torch.randn(16, 128)
    outlier[3, 5] = 100
    assert error(outlier, per="matrix", clip="percentile") != error(outlier, per="matrix", clip="range")
    rest = torch.ones_like(outlier, dtype=torch.bool)
    rest[3, 5] = False
    kept, lost = (matrix(outlier, per="matrix", clip=c)[rest] - outlier[rest] for c in ("percentile", "range"))
    assert kept.square().mean() < lost.square().mean() / 100


def test_cells_and_error_equal_those_of_distances() -> None:
    values, points = torch.randn(5, 40), torch.randn(5, 6).sort(1).values.double()
    line = Line.of(values)
    size, total = line.cells(points)
    near = (values.double()[..., None] - points[:, None]).abs().argmin(2)
    one_hot = nn.functional.one_hot(near, 6)
    assert torch.equal(size, one_hot.sum(1))
    assert torch.allclose(total, (one_hot * values[..., None]).sum(1).double())
    wanted = (points.gather(1, near) - values).square().sum(1, keepdim=True)
    assert torch.allclose(line.error(points, size, total), wanted)


def test_clusters_of_a_small_group_are_the_best_there_are() -> None:
    values = torch.tensor([[-9.0, -8.5, -1.0, -0.5, 0.0, 4.0, 4.5, 10.0]])
    found = levels.clustered(values, 4)

    def cost(cuts: tuple[int, ...]) -> float:
        edges = (0, *cuts, 8)
        return sum(float((p - p.mean()).square().sum()) for a, b in pairwise(edges) for p in [values[0, a:b]])

    best = min(combinations(range(1, 8), 3), key=cost)
    means = [float(values[0, a:b].mean()) for a, b in zip((0, *best), (*best, 8), strict=True)]
    assert found[0].tolist() == pytest.approx(means)
    assert torch.equal(levels.clustered(torch.full((2, 16), 3.0), 4), torch.full((2, 4), 3.0))


def test_powers_of_two_by_hand() -> None:
    points = levels.powers_of_two(torch.tensor([[0.3, -3.5, 1.0], [0.0, 0.0, 0.0]]), 8)
    assert points[0].tolist() == [0, 4, 2, 1, -4, -2, -1, -0.5]
    assert points.shape == (2, 8)
    few = matrix(torch.randn(4, 64), bits=3, points="powers")
    assert bool((few[few != 0].abs().log2() % 1 == 0).all())


def test_clustered_levels_are_closer_than_even_ones_and_are_counted() -> None:
    weight = torch.randn(32, 256)
    for bits in (2, 3, 4):
        assert error(weight, bits=bits, points="kmeans") < min(
            error(weight, bits=bits), error(weight, bits=bits, points="powers")
        )
    module = build(Quantizer(bits=3, points="kmeans"), source(weight), Spot("map"))
    assert isinstance(module, CodebookLinear)
    assert module.ledger() == {"codes": 3 * 32 * 32, "scales": 2 * 32 * 8, "padding": 0, "bias": 0}
    assert module.nbytes() == sum(module.ledger().values())
    both = CodebookLinear.fuse([module, module])
    assert both is not None
    assert torch.equal(both.matrix(), torch.cat([module.matrix()] * 2))
    assert torch.equal(both.rows(torch.tensor([40, 1])), both.matrix()[[40, 1]])
    x = torch.randn(2, 256)
    assert torch.allclose(module(x), x @ module.matrix().T, atol=1e-5)


def test_formats_with_a_kernel_are_stored_for_it() -> None:
    weight = torch.randn(64, 64)
    assert isinstance(build(Quantizer(per="group"), source(weight), Spot("map")), Int4Linear)
    assert isinstance(build(Quantizer(bits=8, symmetry="restricted"), source(weight), Spot("map")), Int8Linear)


def test_a_pruned_weight_stays_zero() -> None:
    session = make_session()
    for knobs in ({"per": "group"}, {}, {"symmetry": "full", "per": "matrix"}, {"points": "powers"}):
        with attached(session, Magnitude(scope="row"), Quantizer(**knobs)):  # type: ignore[arg-type]
            assert weight_metrics(session)["zero_weights"] >= 0.5


def test_widths_that_do_not_fit_are_refused_in_one_sentence() -> None:
    with (
        pytest.raises(SpecError, match="128 does not divide the width 64 of model"),
        attached(make_session(), Quantizer(per="group", group_size=128)),
    ):
        pass
    with pytest.raises(SpecError, match="8 does not divide the width 20 of map"):
        build(Quantizer(), source(torch.randn(4, 20)), Spot("map"))
