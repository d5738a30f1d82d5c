"""WINA against masks worked by hand, every possible mask, and a library model whose inputs a test's own hooks mask."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import tiny
from tests.methods.driving import attached, forced, generate, library_model, make_session, prompt, tokens
from workers.mechanisms.fusing import fuse
from workers.mechanisms.linear import DenseLinear, Replacement
from workers.mechanisms.packed_linear import Int8Linear
from workers.mechanisms.sparse_inputs import SKIPPED, SparseInput, pieces_of
from workers.mechanisms.weight_places import places
from workers.mechanisms.weight_policy import Spot, replacements, weight_bytes, weight_metrics
from workers.policies.quantize.rtn import RoundToNearest
from workers.policies.runtime.lean_decode import LeanDecode
from workers.policies.sparsity.wina import WINA, TopInput
from workers.policies.tokens.promptdistill import PromptDistill


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def wrap(source: nn.Module, keep: float, name: str = "m", **knobs: Any) -> TopInput:
    made = WINA(keep=keep, **knobs).replacement(source, Spot(name))
    assert isinstance(made, TopInput)
    return made


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


# -- one map -------------------------------------------------------------------------------
def test_a_small_map_by_hand() -> None:
    source = linear(4, 2, bias=False)
    source.weight.copy_(torch.tensor([[3.0, 0.0, 1.0, 0.6], [4.0, 1.0, 0.0, 0.8]]))  # norms 5, 1, 1, 1
    x = torch.tensor([[1.0, -4.0, 3.0, 2.0], [-0.5, 2.0, 0.0, 3.0]])  # scores 5 4 3 2 and 2.5 2 0 3
    one = wrap(source, 0.5)
    assert one.chosen(x).tolist() == [[True, True, False, False], [True, False, False, True]]
    assert torch.allclose(one(x), torch.tensor([[3.0, 0.0], [0.3, 0.4]]))
    assert torch.allclose(one(x[:1]), torch.tensor([[3.0, 0.0]]))  # one row: gathered
    by_size = wrap(source, 0.5, norms="key-and-gate")
    assert by_size.norms is None
    assert by_size.chosen(x).tolist() == [[False, True, True, False], [False, True, False, True]]
    assert wrap(source, 0.5, "layers.0.mlp.gate_proj", norms="key-and-gate").norms is not None


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_with_orthogonal_columns_no_mask_of_that_size_moves_the_output_less(keep: float) -> None:
    source, count = linear(8, 12, bias=False), round(8 * keep)
    source.weight.copy_(torch.linalg.qr(torch.randn(12, 8)).Q * torch.rand(8).add(0.2))
    one = wrap(source, keep)
    for x in torch.randn(20, 8):
        losses = {}
        for kept in combinations(range(8), count):
            masked = torch.zeros(8)
            masked[list(kept)] = x[list(kept)]
            losses[kept] = float((source(x) - source(masked)).norm())
        assert min(losses, key=losses.__getitem__) == tuple(one.chosen(x).nonzero().flatten().tolist())


def test_where_all_columns_are_alike_it_goes_by_size() -> None:
    source = linear(32, 32)
    source.weight.copy_(torch.linalg.qr(torch.randn(32, 32)).Q * 2)
    x = torch.randn(5, 32)
    assert torch.equal(wrap(source, 0.4).chosen(x), wrap(source, 0.4, norms="key-and-gate").chosen(x))


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.64, 0.66, 0.9])
def test_every_token_keeps_exactly_its_share_and_one_row_gives_what_many_give(keep: float) -> None:
    source = linear(50, 40)
    one, x = wrap(source, keep), torch.randn(2, 7, 50)
    assert one.gathers == (keep <= 0.65)
    mask = one.chosen(x)
    assert bool((mask.sum(-1) == max(1, round(50 * keep))).all())
    wanted = F.linear(x * mask, source.weight, source.bias)
    assert torch.allclose(one(x), wanted, atol=1e-6)
    alone = torch.stack([torch.cat([one(token[None, None]) for token in row], 1)[0] for row in x])
    assert torch.allclose(alone, wanted, atol=1e-6)


def test_pieces_of_several_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = wrap(linear(64, 1024), 0.5), torch.randn(1, 64)
    wanted = one(x)
    assert [pieces_of(1024, t) for t in (1, 2, 3, 4, 8)] == [1, 2, 2, 4, 4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.allclose(one(x), wanted, atol=1e-6)


def test_bytes_are_those_of_the_map_and_four_an_input_for_the_norms() -> None:
    source = linear(64, 40)
    one = wrap(source, 0.5)
    assert one.ledger() == {"codes": 4 * 64 * 40, "scales": 4 * 64, "padding": 0, "bias": 160}
    assert one.nbytes() == sum(one.ledger().values())
    assert one.bits == 32
    assert torch.equal(one.matrix(), source.weight)
    packed = Int8Linear.of(source)
    masked = wrap(packed, 0.5)
    assert not masked.gathers
    assert masked.nbytes() == packed.nbytes() + 4 * 64
    assert (packed.replaces, masked.replaces, masked.inner.replaces) == (1, 1, 0)  # the wrapped one serves other lanes too
    x = torch.randn(1, 64)
    assert torch.equal(masked(x), packed(x * masked.chosen(x)))
    assert torch.allclose(masked.norms, packed.matrix().norm(dim=0))  # type: ignore[arg-type]


def test_maps_fuse_only_where_they_choose_alike() -> None:
    parts = [linear(64, n, bias=False) for n in (20, 36)]
    assert fuse([wrap(p, 0.5) for p in parts]) is None
    alike = [wrap(p, 0.5, norms="key-and-gate") for p in parts]
    both = fuse(alike)
    assert both is not None
    for x in (torch.randn(1, 64), torch.randn(3, 64)):
        assert torch.allclose(both.whole(x), torch.cat([p(x) for p in alike], -1), atol=1e-6)
    assert isinstance(both.whole, TopInput)
    assert (both.whole.gathers, both.whole.replaces) == (True, 2)


# -- a model -------------------------------------------------------------------------------
def by_library(ids: list[int], keep: float, whole: int) -> Tensor:
    """Logits [T, V] of a plain forward of the library, the inputs masked by hooks of this test."""
    model = library_model(tiny.llama_folder(), "sdpa")

    def mask(module: Any, args: tuple[Any, ...]) -> tuple[Tensor]:
        (x,) = args
        scores = x.abs() * module.weight.pow(2).sum(0).sqrt()
        worst = scores.argsort(-1)[..., : x.shape[-1] - round(keep * x.shape[-1])]
        worst[:, :whole] = worst[:, whole : whole + 1]  # any; these tokens are put back below
        masked = x.scatter(-1, worst, 0.0)
        masked[:, :whole] = x[:, :whole]
        return (masked,)

    inside = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    handles = [m.register_forward_pre_hook(mask) for m in inside]
    try:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("keep", "whole", "chunk"), [(0.5, 4, None), (0.5, 0, None), (0.8, 4, None), (0.5, 9, 6)])
def test_a_model_computes_what_hooks_on_the_librarys_make_it_compute(keep: float, whole: int, chunk: int | None) -> None:
    session, ids, following = make_session(chunk_size=chunk), prompt(24), prompt(10, seed=5)
    wanted = by_library(ids + following, keep, whole)[23:-1].log_softmax(-1)
    with attached(session, WINA(keep=keep, whole=whole)):
        got = forced(session, ids, following)
        assert torch.allclose(got, wanted, atol=1e-4)
        trace = generate(session, [ids], new=8)
    with attached(session, WINA(keep=keep, whole=whole), LeanDecode()):
        assert tokens(generate(session, [ids], new=8)) == tokens(trace)
        assert torch.allclose(forced(session, ids, following), wanted, atol=1e-4)


def test_what_is_left_out_is_counted_to_the_last_multiply_add() -> None:
    session = make_session()
    with attached(session, WINA(keep=0.5)):
        counted = generate(session, [prompt(30)], new=16).counts[SKIPPED]
        assert counted == pytest.approx(0.5 * (30 + 15 - 4) / (30 + 15))  # the first four are whole; the last token is not read
        assert generate(session, [prompt(12)], new=1).counts[SKIPPED] == pytest.approx(0.5 * 8 / 12)
        both = generate(session, [prompt(30), prompt(20)], new=1).counts[SKIPPED]
        assert both == pytest.approx(0.5 * (26 + 16) / (30 + 20))  # padding is not counted
    with attached(session, WINA(keep=0.5), LeanDecode()):
        assert generate(session, [prompt(30)], new=16).counts[SKIPPED] == pytest.approx(counted)
    assert SKIPPED not in generate(session, [prompt(30)]).counts


def test_rows_of_a_batch_are_what_they_are_alone() -> None:
    session, prompts = make_session(), [prompt(30), prompt(19, seed=3)]
    with attached(session, WINA()):
        together = tokens(generate(session, prompts, new=8))
        assert together == [tokens(generate(session, [p], new=8))[0] for p in prompts]


def test_neutral_knobs_give_the_same_bits() -> None:
    session = make_session()
    plain = forced(session, prompt(40), prompt(8, seed=5))
    with attached(session, WINA(keep=1.0)):
        assert torch.equal(forced(session, prompt(40), prompt(8, seed=5)), plain)
        assert weight_metrics(session)["replaced_modules"] == 0
    assert session.acted == {}


def test_it_acts_on_what_stands_there_and_the_account_says_so() -> None:
    session = make_session()
    widths = sum(session.model.get_submodule(n).in_features for n in places(session).linears)
    bare = weight_bytes(session)
    with attached(session, WINA()):
        assert weight_bytes(session) == bare + 4 * widths
        assert weight_metrics(session)["replaced_modules"] == 14
    with attached(session, RoundToNearest(bits=4)):
        packed, made = weight_metrics(session), replacements(session, RoundToNearest(bits=4))
        with attached(session, WINA()):
            metrics = weight_metrics(session)
            assert metrics["weight_bytes"] == packed["weight_bytes"] + 4 * widths
            assert metrics["replaced_modules"] == packed["replaced_modules"] == 15
            inside = [m for m in session.model.modules() if isinstance(m, SparseInput)]
            assert len(inside) == 14
            assert all(type(m.inner) is not DenseLinear for m in inside)
            with attached(session, LeanDecode()):
                assert len(tokens(generate(session, [prompt(20)], new=4))[0]) == 4
        assert weight_metrics(session) == packed
    assert all(m.replaces == 1 for m in made.values() if isinstance(m, Replacement))


def test_experts_and_travelling_tokens() -> None:
    session = make_session(tiny.moe_folder())
    with attached(session, WINA(whole=0)):
        assert generate(session, [prompt(20)], new=4).counts[SKIPPED] == pytest.approx(0.5)
    session = make_session()
    with attached(session, WINA(whole=2), PromptDistill(depth=0.5, keep=0.5)):
        assert 0.4 < generate(session, [prompt(64)], new=4).counts[SKIPPED] < 0.5
