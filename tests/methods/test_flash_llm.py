"""Flash-LLM as a policy: its own pruning, masks of others, the break-even, and the pruned dense model's numbers to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch

from studio_state.errors import SpecError
from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prompt, tokens
from workers.mechanisms.linear import DenseLinear
from workers.mechanisms.tiled_csl import TiledSparseLinear, break_even
from workers.mechanisms.weight_policy import weight_bytes, weight_metrics
from workers.methods import Policy
from workers.policies.prune.magnitude import Magnitude
from workers.policies.prune.wanda import Wanda
from workers.policies.quantize.flash_llm import FlashLLM
from workers.policies.runtime.lean_decode import LeanDecode
from workers.session import Session


def sparse_maps(session: Session) -> list[TiledSparseLinear]:
    return [m for m in session.model.modules() if isinstance(m, TiledSparseLinear)]


def scores(session: Session, *policies: Policy) -> torch.Tensor:
    with attached(session, *policies):
        return forced(session, prompt(40), prompt(8, seed=5))


def in_bfloat16() -> Session:
    session = make_session()
    session.model, session.dtype = copy.deepcopy(session.model).bfloat16(), torch.bfloat16
    return session


def test_alone_it_is_magnitude_pruning_with_fewer_bytes() -> None:
    session = make_session()
    with attached(session, FlashLLM(sparsity=0.8)):
        assert len(sparse_maps(session)) == 14
        assert weight_metrics(session)["zero_weights"] == pytest.approx(0.8, abs=1e-3)
        mine = tokens(generate(session, [prompt(20)]))
    assert torch.equal(scores(session, FlashLLM(sparsity=0.8)), scores(session, Magnitude(sparsity=0.8)))
    with attached(session, Magnitude(sparsity=0.8)):
        assert tokens(generate(session, [prompt(20)])) == mine


@pytest.mark.parametrize("pruner", [Magnitude(sparsity=0.7), Wanda(sparsity=0.7, samples=1)], ids=["magnitude", "wanda"])
def test_a_mask_from_before_is_kept(pruner: Policy) -> None:
    session = make_session()
    assert torch.equal(scores(session, pruner, FlashLLM(sparsity=0.95)), scores(session, pruner))
    with attached(session, pruner):
        dense, share = weight_bytes(session), weight_metrics(session)["zero_weights"]
        wanted = [m.weight for m in session.model.modules() if isinstance(m, DenseLinear)]
        with attached(session, FlashLLM()):
            assert weight_bytes(session) < dense
            assert weight_metrics(session)["zero_weights"] == share
            assert all(torch.equal(m.decoded(), w) for m, w in zip(sparse_maps(session), wanted, strict=True))


def test_the_bytes_of_the_model_by_the_formula() -> None:
    for session, size in ((make_session(), 4), (in_bfloat16(), 2)):
        bare = weight_bytes(session)
        with attached(session, FlashLLM(sparsity=0.75)):
            weights = sum(m.in_features * m.out_features for m in sparse_maps(session))
            tiles = sum(len(m.offsets) for m in sparse_maps(session))
            filled = sum(m.ledger()["padding"] for m in sparse_maps(session))
            assert weight_bytes(session) == bare - size * weights + (size + 2) * weights // 4 + 4 * tiles + filled


def test_below_the_break_even_nothing_is_stored_and_it_says_so() -> None:
    assert (break_even(2), break_even(4)) == (1 / 2, 1 / 3)
    for session, below, above in ((in_bfloat16(), 0.5, 0.52), (make_session(), 0.33, 0.35)):
        before = scores(session)
        for policies in ((FlashLLM(sparsity=below),), (Magnitude(sparsity=below), FlashLLM())):
            with attached(session, *policies):
                assert sparse_maps(session) == []
        assert "flash-llm" not in session.acted
        assert torch.equal(scores(session, FlashLLM(sparsity=below)), before)  # nor is anything pruned then
        with attached(session, FlashLLM(sparsity=above)):
            assert len(sparse_maps(session)) == 14
    assert "in float32 more than 33% of a map's weights must be zero" in FlashLLM().why_idle(make_session())
    assert "in bfloat16 more than 50%" in FlashLLM().why_idle(in_bfloat16())


def test_a_checkpoint_that_comes_pruned_is_stored_as_it_is() -> None:
    session = make_session()
    session.model = copy.deepcopy(session.model)
    with attached(session, Magnitude(sparsity=0.9)):
        pruned = {n: m.weight for n, m in session.model.named_modules() if isinstance(m, DenseLinear)}
    for name, weight in pruned.items():
        session.model.get_submodule(name).weight.data = weight
    before = scores(session)
    with attached(session, FlashLLM(sparsity=0.0)):
        assert len(sparse_maps(session)) == len(pruned)
    assert torch.equal(scores(session, FlashLLM(sparsity=0.0)), before)


def test_experts_and_the_transposed_maps_of_gpt2_are_stored_too() -> None:
    for folder, count in ((tiny.gpt2_folder(), 8), (tiny.moe_folder(), None)):
        session = make_session(folder)
        expected = scores(session, Magnitude(sparsity=0.8))
        with attached(session, FlashLLM(sparsity=0.8)):
            assert count is None or len(sparse_maps(session)) == count
            assert count or any("experts" in n for n, m in session.model.named_modules() if isinstance(m, TiledSparseLinear))
        torch.testing.assert_close(scores(session, FlashLLM(sparsity=0.8)), expected, rtol=1e-5, atol=1e-5)


def test_lean_decode_decides_the_same_tokens() -> None:
    session = make_session()
    with attached(session, FlashLLM()):
        plain = tokens(generate(session, [prompt(20)]))
    with attached(session, FlashLLM(), LeanDecode()):
        assert tokens(generate(session, [prompt(20)])) == plain
        assert any(m.replaces == 3 for m in sparse_maps(session))


def test_the_kernel_is_refused_where_it_cannot_run() -> None:
    with (
        pytest.raises(SpecError, match=r"product = triton needs an NVIDIA GPU.*this is float32 on cpu: take product = unpack"),
        attached(make_session(), FlashLLM(product="triton")),
    ):
        pass
