"""Magnitude pruning against a sort of the absolute values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods.driving import attached, forced, generate, make_session, prompt, tokens
from workers.mechanisms.weight_places import places
from workers.mechanisms.weight_policy import weight_bytes, weight_metrics
from workers.policies.prune.magnitude import Magnitude, prune
from workers.policies.quantize.rtn import RoundToNearest


def test_a_small_matrix_by_hand() -> None:
    weight = torch.tensor([[4.0, -1.0, 0.5, 8.0], [-3.0, 2.0, 7.0, -6.0]])
    assert prune(weight, 0.5, by_row=False).tolist() == [[4.0, 0.0, 0.0, 8.0], [0.0, 0.0, 7.0, -6.0]]
    assert prune(weight, 0.5, by_row=True).tolist() == [[4.0, 0.0, 0.0, 8.0], [0.0, 0.0, 7.0, -6.0]]
    assert prune(weight, 0.25, by_row=False).tolist() == [[4.0, 0.0, 0.0, 8.0], [-3.0, 2.0, 7.0, -6.0]]
    assert prune(weight, 0.25, by_row=True).tolist() == [[4.0, -1.0, 0.0, 8.0], [-3.0, 0.0, 7.0, -6.0]]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.83, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_smallest_go_ties_included(sparsity: float, dtype: torch.dtype) -> None:
    weight = (
        torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).mul(4).round().add(0.5).to(dtype)
    )  # many ties, no zeros
    for by_row, groups in ((False, weight.reshape(1, -1)), (True, weight)):
        pruned = prune(weight, sparsity, by_row).reshape(groups.shape)
        for before, after in zip(groups.float().numpy(), pruned.float().numpy(), strict=True):
            gone = after == 0
            assert gone.sum() == int(sparsity * before.size)
            assert np.array_equal(after[~gone], before[~gone])
            if gone.any() and not gone.all():
                assert np.abs(before[gone]).max() <= np.abs(before[~gone]).min()
                assert np.array_equal(np.sort(np.abs(before))[: gone.sum()], np.sort(np.abs(before[gone])))


def test_the_account_tells_that_zeros_are_stored() -> None:
    session = make_session()
    bare = weight_bytes(session)
    with attached(session, Magnitude(sparsity=0.5)):
        metrics = weight_metrics(session)
    assert metrics == {
        "weight_bytes": bare,
        "theoretical_weight_bytes": bare,
        "scale_bytes": 0,
        "padding_bytes": 0,
        "mean_bits": 32.0,
        "replaced_modules": 14,
        "zero_weights": 0.5,
    }


def test_embedding_and_head_stay_and_originals_are_not_edited() -> None:
    session = make_session()
    head, before = session.model.lm_head, forced(session, prompt(40), prompt(8, seed=5))
    with attached(session, Magnitude()):
        assert session.model.lm_head is head
        assert not torch.equal(forced(session, prompt(40), prompt(8, seed=5)), before)
    assert torch.equal(forced(session, prompt(40), prompt(8, seed=5)), before)
    assert all((session.model.get_submodule(n).weight != 0).all() for n in places(session).linears)


def test_sparsity_zero_is_the_baseline() -> None:
    session = make_session()
    plain = tokens(generate(session, [prompt(20)]))
    with attached(session, Magnitude(sparsity=0.0)):
        assert tokens(generate(session, [prompt(20)])) == plain
    assert session.acted == {}


@pytest.mark.parametrize("bits", [8, 4])
def test_the_mask_survives_rounding(bits: int) -> None:
    session = make_session()
    with attached(session, Magnitude(sparsity=0.5)):
        masks = {n: session.model.get_submodule(n).weight == 0 for n in places(session).linears}
    with attached(session, Magnitude(sparsity=0.5), RoundToNearest(bits=bits)):
        assert all((session.model.get_submodule(n).matrix()[mask] == 0).all() for n, mask in masks.items())
        assert weight_metrics(session)["zero_weights"] >= 0.5
