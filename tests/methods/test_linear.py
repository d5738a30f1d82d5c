"""Replacing linear maps: swapped and undone, cached by what they were built from, every byte counted once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import tiny
from tests.methods.driving import attached, generate, make_session, prompt, tokens
from workers.mechanisms.linear import DenseLinear, Replacement, held_bytes
from workers.mechanisms.weight_places import find_places, places
from workers.mechanisms.weight_policy import replacements, weight_bytes, weight_metrics
from workers.policies.prune.magnitude import Magnitude
from workers.policies.quantize.rtn import RoundToNearest

TIED = {"name": "llama-tied", "tie_word_embeddings": True}
FLOAT = 4


def test_places_of_a_tied_and_an_untied_model() -> None:
    untied = make_session(tiny.llama_folder())
    tied = make_session(tiny.llama_folder(**TIED))
    assert find_places(untied.family, untied.model).embedding is None
    assert places(tied).embedding == "model.embed_tokens"
    assert places(tied).head == "lm_head"
    assert len(places(tied).linears) == 2 * 7


def test_places_are_those_of_the_bare_model_even_when_asked_under_another_policy() -> None:
    session = make_session()
    with attached(session, Magnitude(), RoundToNearest()):
        assert len(places(session).linears) == 14
        assert all(isinstance(session.model.get_submodule(n), Replacement) for n in places(session).linears)


def test_bytes_of_a_bare_model_count_tied_tensors_once() -> None:
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    norms, rotary = 5 * 64, 2 * 8  # rotary: frequencies and their originals
    table = tiny.VOCAB * 64
    tied, untied = make_session(tiny.llama_folder(**TIED)), make_session()
    assert weight_bytes(tied) == FLOAT * (linears + norms + rotary + table)
    assert weight_bytes(untied) == FLOAT * (linears + norms + rotary + 2 * table)


def test_overlapping_views_count_once_and_meta_tensors_do_not() -> None:
    whole = torch.zeros(10, 4)
    module = nn.Module()
    module.register_buffer("whole", whole)
    module.register_buffer("top", whole[:6])
    module.register_buffer("columns", whole[:, 1:3])
    module.register_buffer("alone", torch.zeros(3, dtype=torch.int8))
    module.register_buffer("nothing", torch.zeros(1000, device="meta"))
    assert held_bytes([module]) == 10 * 4 * 4 + 3
    del module.whole
    assert held_bytes([module]) == 39 * 4 + 3  # top ends at 24, columns reaches from 1 to 39


def test_built_once_and_everything_undone() -> None:
    session, policy = make_session(), RoundToNearest(bits=4)
    before = {n: m for n, m in session.model.named_modules()}
    values = {n: p.clone() for n, p in session.model.named_parameters()}
    plain = tokens(generate(session, [prompt(20)]))
    first = replacements(session, policy)
    with attached(session, policy):
        assert weight_metrics(session)["replaced_modules"] == 15
    with attached(session, policy):
        inside = {n: session.model.get_submodule(n) for n in first}
    assert all(inside[n] is first[n] for n in first)
    assert session.acted == {"rtn": 30}
    assert all(m is before[n] for n, m in session.model.named_modules())
    assert all(torch.equal(p, values[n]) for n, p in session.model.named_parameters())
    assert tokens(generate(session, [prompt(20)])) == plain


def test_everything_is_undone_after_an_error() -> None:
    session = make_session()
    before = list(session.model.modules())
    with pytest.raises(RuntimeError, match="inside"), attached(session, RoundToNearest()):
        raise RuntimeError("inside")
    assert list(session.model.modules()) == before


def test_a_later_policy_builds_from_what_the_earlier_one_left() -> None:
    session, name = make_session(), "model.layers.0.mlp.down_proj"
    rtn = RoundToNearest(bits=4)
    with attached(session, rtn):
        alone = session.model.get_submodule(name)
    with attached(session, Magnitude(sparsity=0.5), rtn):
        after = session.model.get_submodule(name)
    with attached(session, Magnitude(sparsity=0.75), rtn):
        sparser = session.model.get_submodule(name)
    assert len({id(m) for m in (alone, after, sparser)}) == 3
    share = [float((m.matrix() == 0).float().mean()) for m in (alone, after, sparser)]
    assert share[0] < 0.1
    assert share[1] >= 0.5
    assert share[2] >= 0.75


def test_dense_parts_fuse_exactly_and_unlike_ones_do_not() -> None:
    torch.manual_seed(0)
    a, b = DenseLinear(torch.randn(8, 16), torch.randn(8)), DenseLinear(torch.randn(24, 16), torch.randn(24))
    a.zeros, b.zeros = 3, 4
    whole = DenseLinear.fuse([a, b])
    assert whole is not None
    assert torch.equal(whole.weight, torch.cat([a.weight, b.weight]))
    assert torch.equal(whole.bias, torch.cat([a.bias, b.bias]))
    assert (whole.zeros, whole.replaces, whole.out_features) == (7, 2, 32)
    assert DenseLinear.fuse([a, DenseLinear(torch.randn(8, 16), None)]) is None
    assert DenseLinear.fuse([a, DenseLinear(torch.randn(8, 16).double(), torch.randn(8))]) is None
