"""AWQ: the scaling changes nothing by itself, the search finds the best alpha and the best clipping, and maps of one input share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.methods.driving import attached, generate, make_session, prompt, tokens
from workers.mechanisms import calibration, packing
from workers.mechanisms.calibration import Seen, gathered
from workers.mechanisms.fusing import FusedPart
from workers.mechanisms.linear import DenseLinear, matrix_of
from workers.mechanisms.output_error import output_error, rounded
from workers.mechanisms.scaled_input import ScaledInput
from workers.mechanisms.weight_policy import Spot, replacements, targets, weight_bytes, weight_metrics
from workers.policies.prune.magnitude import Magnitude
from workers.policies.quantize.awq import AWQ, CLIPS, clipped, input_factor
from workers.policies.quantize.rtn import RoundToNearest
from workers.policies.runtime.lean_decode import LeanDecode
from workers.session import Session

LAYER = "model.layers.0"
FAMILIES = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj")]


def loud(rows: int = 24, width: int = 64) -> tuple[Tensor, Tensor]:
    """Weights [N, K], and inputs [R, K] of which some channels are far louder than the others."""
    pen = torch.Generator().manual_seed(rows)
    size = torch.where(torch.rand(width, generator=pen) > 0.9, 30.0, 1.0)
    return torch.randn(rows, width, generator=pen) * 0.05, torch.randn(300, width, generator=pen) * size


def seen(x: Tensor) -> Seen:
    return Seen(len(x), x.abs().mean(0), x.abs().amax(0), x.T @ x / len(x), None, "map")


def statistics(session: Session, names: list[str]) -> dict[str, Seen]:
    return {n: s for _, group in gathered(session, names, frozenset({"moment"}), 8) for n, s in group.items()}


def rounding(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Asymmetric rounding to the nearest, written out: steps and centres in bfloat16."""
    out = np.empty_like(weight)
    for a in range(0, weight.shape[1], group):
        w = weight[:, a : a + group]
        middle, step = (w.max(1) + w.min(1)) / 2, (w.max(1) - w.min(1)) / (2**bits - 1)
        step = torch.tensor(np.maximum(step, np.abs(middle) / 128)).float().bfloat16().double().numpy()
        zero = torch.tensor(middle + step / 2).float().bfloat16().double().numpy()
        levels = np.rint((w - zero[:, None]) / step[:, None]).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        out[:, a : a + group] = levels * step[:, None] + zero[:, None]
    return out


def test_scaling_alone_changes_nothing() -> None:
    weight, x = loud()
    for alpha in (0.0, 0.35, 0.95):
        factor = input_factor(x.abs().mean(0), alpha)
        scaled = ScaledInput(DenseLinear(weight.double() / factor.double(), None), factor)
        assert torch.allclose(scaled(x.double()), x.double() @ weight.double().T, rtol=1e-12, atol=1e-12)
        assert factor.dtype == torch.bfloat16
    assert input_factor(x.abs().mean(0), 0.0).tolist() == [1.0] * 64


def test_scales_by_hand() -> None:
    """Means of 1, 4 and 16 to the power one half are 1, 2 and 4, and 2 is the root of the least times the largest."""
    assert input_factor(torch.tensor([1.0, 4.0, 16.0]), 0.5).tolist() == [2.0, 1.0, 0.5]
    assert input_factor(torch.tensor([1.0, 4.0, 16.0]), 1.0).tolist() == [4.0, 1.0, 0.25]


def test_no_steps_and_no_clipping_is_round_to_nearest() -> None:
    session, found = make_session(), []
    for policy in (RoundToNearest(bits=4), AWQ(steps=1, clip=False), AWQ()):
        names = targets(session, policy)
        with attached(session, policy):
            found.append(([matrix_of(session.model.get_submodule(n)) for n in names], weight_bytes(session)))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1]
    assert not torch.equal(found[0][0][0], found[2][0][0])


@pytest.mark.parametrize(("bits", "group", "steps"), [(4, 32, 20), (3, 32, 20), (4, 64, 7), (2, 32, 20)])
def test_the_alpha_is_the_one_that_a_plain_search_finds(bits: int, group: int, steps: int) -> None:
    """On the inputs themselves, in float64."""
    weight, x = loud()
    w, rows, best, least = weight.double().numpy(), x.double().numpy(), 0.0, np.inf
    for alpha in (i / steps for i in range(steps)):
        factor = input_factor(x.abs().mean(0), alpha).double().numpy()
        error = (((rounding(w / factor, bits, group) * factor - w) @ rows.T) ** 2).sum()
        best, least = (alpha, error) if error < least else (best, least)
    assert best > 0
    found = AWQ(bits=bits, group_size=group, steps=steps).factor(weight, x.abs().mean(0), x.T @ x / len(x))
    assert found is not None
    assert torch.equal(found, input_factor(x.abs().mean(0), best))
    nearest = float((((rounding(w, bits, group) - w) @ rows.T) ** 2).sum())
    assert least < nearest


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", [False, True])
def test_maps_of_one_input_lose_no_more_together_than_by_rounding(bits: int, clip: bool) -> None:
    session = make_session()
    names = [f"model.layers.{i}.{n}" for i in range(2) for n in (*sum(FAMILIES, ()), "mlp.down_proj")]
    stats = statistics(session, names)
    before = {n: matrix_of(session.model.get_submodule(n)).detach() for n in names}
    errors = []
    for policy in (RoundToNearest(bits=bits), AWQ(bits=bits, clip=clip)):
        with attached(session, policy):
            changes = {n: matrix_of(session.model.get_submodule(n)) - before[n] for n in names}
        together: dict[str, float] = {}
        for n, change in changes.items():
            together[stats[n].beside] = together.get(stats[n].beside, 0.0) + float(output_error(change, stats[n].moment).sum())  # type: ignore[arg-type]
        errors.append(together)
    assert len(errors[0]) == 8
    assert all(errors[1][n] <= errors[0][n] * (1 + 1e-6) for n in errors[0])
    assert sum(errors[1].values()) < sum(errors[0].values())


def test_clipping_is_the_best_of_each_group_and_no_row_loses_by_it() -> None:
    weight, x = loud()
    weight[:, 5] *= 6  # outliers on a channel that says nothing
    x[:, 5] = 0
    moment, grid = x.T @ x / len(x), packing.fit_groups(weight, 32, 3)
    mine = clipped(weight, grid, 3, moment)
    rows, kept = x.double().numpy(), 0
    tried = torch.stack([packing.fit_groups(weight, 32, 3, share) for share in CLIPS])  # [10, K/g, N, 2]

    def change(g: Tensor) -> np.ndarray:
        return (packing.dequantise(packing.encode(weight, g, 3).T, g, 3).T - weight).double().numpy()

    parts = np.stack(  # [10, K/g, N]
        [[((change(g)[:, a : a + 32] @ rows[:, a : a + 32].T) ** 2).mean(1) for a in (0, 32)] for g in tried]
    )
    best = torch.from_numpy(parts.argmin(0))  # [K/g, N]
    wanted = tried.gather(0, best[None, ..., None].expand(1, *best.shape, 2))[0]
    before, after = ((((change(g)) @ rows.T) ** 2).mean(1) for g in (grid, mine))
    for row in range(len(weight)):
        whole = ((change(wanted)[row] @ rows.T) ** 2).mean()
        assert torch.equal(mine[:, row], wanted[:, row] if whole < before[row] else grid[:, row])
        kept += whole < before[row]
    assert kept > len(weight) // 2
    assert (after <= before).all()
    assert (mine[0, :, 0] < grid[0, :, 0]).float().mean() > 0.9  # the group of the outliers


def test_queries_and_keys_are_not_clipped() -> None:
    weight, x = loud()
    grid = packing.fit_groups(weight, 32, 3)
    for name, same in (("a.q_proj", True), ("a.to_k", True), ("a.v_proj", False), ("a.c_attn", False)):
        _, mine = AWQ(bits=3).codes(weight, grid, 3, Spot(name, seen=seen(x)))
        assert torch.equal(mine, grid) == same
    _, mine = AWQ(bits=3).codes(weight, grid, 3, Spot("a.v_proj"))  # nothing was seen
    assert torch.equal(mine, grid)


def test_maps_of_one_input_share_one_factor_however_statistics_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    session, policy = make_session(), AWQ()
    new = replacements(session, policy)
    for family in FAMILIES:
        first, *others = [new[f"{LAYER}.{n}"] for n in family]
        assert isinstance(first, ScaledInput)
        assert all(isinstance(o, ScaledInput) and o.scale is first.scale for o in others)
    monkeypatch.setattr(calibration, "GROUP_BYTES", 60_000)  # a few maps a group
    again = replacements(make_session(), policy)
    for name in (f"{LAYER}.{n}" for family in FAMILIES for n in family):
        assert torch.equal(again[name].scale, new[name].scale)  # type: ignore[arg-type]
        assert torch.equal(matrix_of(again[name]), matrix_of(new[name]))


def test_bytes_are_those_of_round_to_nearest_and_two_an_input_channel() -> None:
    session, held = make_session(), []
    for policy in (RoundToNearest(bits=4), AWQ()):
        with attached(session, policy):
            held.append(weight_bytes(session))
            made = [m for m in session.model.modules() if isinstance(m, ScaledInput)]
    shared = {id(m.scale): m.in_features for m in made}
    assert held[1] == held[0] + 2 * sum(shared.values())
    assert made[0].ledger()["scales"] == made[0].inner.ledger()["scales"] + 2 * 64
    assert all(sum(m.ledger().values()) == m.nbytes() for m in made)


def test_lean_decode_fuses_what_shares_a_factor_and_writes_the_same() -> None:
    session, texts = make_session(), []
    for more in ((), (LeanDecode(),)):
        with attached(session, AWQ(bits=8), *more):
            texts.append(tokens(generate(session, [prompt(40)], new=12)))
            fused = [m for m in session.model.modules() if isinstance(m, FusedPart)]
    assert texts[0] == texts[1]
    assert len(fused) == 2 * 5
    assert all(isinstance(m.fused.whole, ScaledInput) for m in fused)


def test_the_model_computes_with_the_matrices_of_its_replacements() -> None:
    """Each map's output on random inputs is that of its effective weights, which lie nearer to the source than scaled ones."""
    session = make_session()
    name = f"{LAYER}.mlp.up_proj"
    source = session.model.get_submodule(name)
    new = replacements(session, AWQ(bits=3))[name]
    x = torch.randn(100, 64)
    assert torch.allclose(new(x), x @ matrix_of(new).T, atol=1e-4)
    change, weight = matrix_of(new) - matrix_of(source).detach(), matrix_of(source).detach()
    assert float(change.norm() / weight.norm()) < 0.25
    assert new.bits == 3


def test_a_head_in_the_same_format_is_scaled_and_its_tied_embedding_reads_it() -> None:
    session = make_session(tiny.llama_folder(name="llama-tied", tie_word_embeddings=True))
    with attached(session, AWQ(head="same")):
        head, embedding = session.model.lm_head, session.model.get_input_embeddings()
        assert isinstance(head, ScaledInput)
        ids = torch.tensor([[3, 400, 3]])
        assert torch.equal(embedding(ids), head.matrix()[ids])
        tokens(generate(session, [prompt(20)], new=4))


def test_a_mask_survives_and_experts_have_factors_of_their_own() -> None:
    session = make_session()
    with attached(session, Magnitude(sparsity=0.5)):
        masked = weight_metrics(session)["zero_weights"]
    with attached(session, Magnitude(sparsity=0.5), AWQ(head="keep")):
        assert weight_metrics(session)["zero_weights"] >= masked
    session = make_session(tiny.moe_folder())
    with attached(session, AWQ(bits=8)):
        experts = [m for n, m in session.model.named_modules() if ".experts." in n and isinstance(m, ScaledInput)]
        assert len({id(m.scale) for m in experts}) == len(experts) > 16


def test_rounded_is_what_round_to_nearest_stores() -> None:
    source = nn.Linear(64, 48, bias=False).requires_grad_(False)
    for bits in (3, 4, 8):
        stored = RoundToNearest(bits=bits).replacement(source, Spot("map"))
        assert stored is not None
        assert torch.equal(rounded(source.weight, bits, 32), stored.matrix())
