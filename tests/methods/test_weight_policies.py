"""What all weight policies share: every kind of linear map is reached, targeting, bit planes, experts one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from studio_state.errors import SpecError
from tests import tiny, tiny_states
from tests.methods.drawing import OWN, opened, pipeline_folder
from tests.methods.driving import attached, generate, make_session, prompt, tokens
from workers.mechanisms import packing
from workers.mechanisms.expert_linears import ExpertLinears
from workers.mechanisms.linear import Convolved, DenseLinear, Replacement, bias_of, matrix_of
from workers.mechanisms.packed_linear import BitPlaneLinear, Int4Linear, Int8Linear
from workers.mechanisms.weight_places import places
from workers.mechanisms.weight_policy import replacements, targets, weight_bytes, weight_metrics
from workers.methods import discover
from workers.policies.prune.expert_prune import ExpertPrune
from workers.policies.prune.magnitude import Magnitude
from workers.policies.quantize.rtn import RoundToNearest


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_planes_give_back_every_code(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 24), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    planes = packing.pack_planes(codes, bits)
    assert planes.shape == (bits, 5, 3)
    assert torch.equal(packing.unpack_planes(planes), codes)


def test_bit_planes_by_hand() -> None:
    planes = packing.pack_planes(torch.tensor([[1, 2, 3, 0, 0, 0, 0, 2]], dtype=torch.uint8), 2)
    assert planes.flatten().tolist() == [0b00000101, 0b10000110]  # the lowest bits, then the higher ones; input 0 is bit 0


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_any_number_of_bits_rounds_within_half_a_step(bits: int) -> None:
    torch.manual_seed(bits)
    source = nn.Linear(64, 40).requires_grad_(False)
    codes, grid = packing.round_groups(source.weight, 32, bits)
    packed = BitPlaneLinear.stored(codes, grid, bits, source.bias)
    step = grid[..., 0].float().T.repeat_interleave(32, 1)
    assert bool(((packed.matrix() - source.weight).abs() <= step / 2 * 1.001).all())
    assert int(codes.max()) == 2**bits - 1
    assert packed.ledger() == {"codes": bits * 40 * 8, "scales": 4 * 2 * 40, "padding": 0, "bias": 4 * 40}
    assert packed.nbytes() == sum(packed.ledger().values())
    x = torch.randn(3, 64)
    assert torch.allclose(packed(x), F.linear(x, packed.matrix(), source.bias), atol=1e-6)
    assert torch.equal(packed.rows(torch.tensor([7, 2])), packed.matrix()[[7, 2]])
    both = BitPlaneLinear.fuse([packed, packed])
    assert both is not None
    assert torch.equal(both.matrix(), torch.cat([packed.matrix(), packed.matrix()]))


def test_ledgers_add_up() -> None:
    source = nn.Linear(64, 40).requires_grad_(False)
    eight, four = Int8Linear.of(source), Int4Linear.of(source, 32)
    assert eight.ledger() == {"codes": 40 * 64, "scales": 2 * 40, "padding": 0, "bias": 160}
    assert four.ledger() == {"codes": 40 * 32, "scales": 4 * 2 * 40, "padding": 24 * 32 + 4 * 2 * 24, "bias": 160}
    for one in (eight, four, DenseLinear(source.weight, source.bias)):
        assert one.nbytes() == sum(one.ledger().values())


def test_the_transposed_maps_of_gpt2_are_replaced() -> None:
    session = make_session(tiny.gpt2_folder())
    names = places(session).linears
    assert len(names) == 2 * 4
    assert all(isinstance(session.model.get_submodule(n), Conv1D) for n in names)
    name = next(n for n in names if n.endswith("c_attn"))
    source = session.model.get_submodule(name)
    assert torch.equal(matrix_of(source), source.weight.T)
    x = torch.randn(2, 5, source.weight.shape[0])
    assert torch.allclose(DenseLinear(matrix_of(source), bias_of(source))(x), source(x), atol=1e-5)
    before, plain = weight_bytes(session), tokens(generate(session, [prompt(20)]))
    with attached(session, RoundToNearest(head="keep")):
        assert weight_metrics(session)["replaced_modules"] == 8
        assert weight_bytes(session) < before
    assert tokens(generate(session, [prompt(20)])) == plain


def test_convolutions_keep_packed_weights_and_their_geometry(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = nn.Conv2d(32, 8, 3, stride=2, padding=1).requires_grad_(False)
    packed = Convolved(BitPlaneLinear.stored(*packing.round_groups(matrix_of(source), 32, 6), 6, source.bias), source)
    x = torch.randn(2, 32, 9, 9)
    wanted = F.conv2d(x, packed.inner.matrix().view_as(source.weight), source.bias, stride=2, padding=1)
    assert torch.equal(packed(x), wanted)
    assert torch.equal(matrix_of(packed), packed.inner.matrix())
    session = opened(pipeline_folder(OWN, tmp_path))
    spots = places(session)
    assert spots.convolutions
    assert all(isinstance(session.model.get_submodule(n), nn.Conv2d) for n in spots.convolutions)
    with attached(session, Magnitude(sparsity=0.5)):
        found = [session.model.get_submodule(n) for n in spots.convolutions]
        assert all(isinstance(m, Convolved) for m in found)
        assert weight_metrics(session)["zero_weights"] == pytest.approx(0.5, abs=0.01)
        assert weight_metrics(session)["replaced_modules"] == len(spots.convolutions) + len(spots.linears)
    assert all(isinstance(session.model.get_submodule(n), nn.Conv2d) for n in spots.convolutions)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_as_linear_maps_compute_what_the_library_computes(kind: str) -> None:
    session = make_session(tiny.moe_folder(kind))
    (first, *_), pen = places(session).experts, torch.Generator().manual_seed(0)
    library: Any = session.model.get_submodule(first)
    mine = ExpertLinears.of(library)
    x = torch.randn(11, library.hidden_dim if hasattr(library, "hidden_dim") else library.gate_up_proj.shape[2], generator=pen)
    visits = torch.stack([torch.randperm(mine.num_experts, generator=pen)[:2] for _ in range(11)])
    weights = torch.rand(11, 2, generator=pen)
    assert torch.allclose(mine(x, visits, weights), library(x, visits, weights), atol=1e-6)
    assert mine.gate_up_proj[1].weight.data_ptr() == library.gate_up_proj[1].data_ptr()  # views: no byte is copied


def test_quantized_experts_free_their_bytes_and_are_counted() -> None:
    session = make_session(tiny.moe_folder())
    layers = len(places(session).experts)
    bare = weight_bytes(session)
    experts: Any = session.model.get_submodule(places(session).experts[0])
    count = experts.gate_up_proj.shape[0]
    with attached(session, RoundToNearest(head="keep", modules="*.experts.*")):
        assert weight_metrics(session)["replaced_modules"] == layers * count * 2
        saved = bare - weight_bytes(session)
    elements = layers * (experts.gate_up_proj.numel() + experts.down_proj.numel())
    scales = 2 * layers * count * (experts.gate_up_proj.shape[1] + experts.down_proj.shape[1])
    assert saved == 3 * elements - scales  # four bytes become one, and a bfloat16 scale a row
    with attached(session, Magnitude(sparsity=0.5)):
        assert weight_metrics(session)["zero_weights"] == pytest.approx(0.5, abs=0.01)


def test_experts_that_were_pruned_or_masked_before_are_quantized_as_they_are_left() -> None:
    session = make_session(tiny.moe_folder())
    for order in ([ExpertPrune(keep=0.5), RoundToNearest()], [Magnitude(sparsity=0.5), ExpertPrune(keep=0.5), RoundToNearest()]):
        with attached(session, *order):
            left = session.model.get_submodule(places(session).experts[0])
            assert isinstance(left, ExpertLinears)
            assert left.num_experts < 8
            assert all(isinstance(m, Int8Linear) for m in left.gate_up_proj)
            generate(session, [prompt(12)])


def test_patterns_choose_maps_and_a_pattern_that_matches_nothing_is_refused() -> None:
    session = make_session()
    some = RoundToNearest(modules="*.0.mlp.*, *.q_proj")
    assert targets(session, some) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert set(replacements(session, some)) == set(targets(session, some))
    with pytest.raises(SpecError, match=r"modules = '\*\.nothing' matches no linear map of .*; they have names such as model"):
        replacements(session, RoundToNearest(modules="*.nothing"))


def test_each_width_of_code_is_smaller_than_the_next() -> None:
    session, sizes = make_session(), []
    for bits in range(2, 9):
        with attached(session, RoundToNearest(bits=bits)):
            made = [m for m in session.model.modules() if isinstance(m, Replacement)]
            assert {type(m) for m in made} == {Int8Linear, {4: Int4Linear, 8: Int8Linear}.get(bits, BitPlaneLinear)}
            sizes.append(sum(m.ledger()["codes"] for m in made))
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("name", [n for n, cls in discover().items() if cls.card.alters_weights and not cls.card.traits])
def test_pure_state_space_models_whose_code_asks_for_the_head_s_format(name: str) -> None:
    """Mamba reads ``lm_head.weight.dtype`` in every forward."""
    session = make_session(tiny_states.mamba2_folder())
    plain = tokens(generate(session, [prompt(24)], 4))
    with attached(session, discover()[name]()):
        assert len(tokens(generate(session, [prompt(24)], 4))[0]) == 4
    assert session.acted[name] > 0
    assert tokens(generate(session, [prompt(24)], 4)) == plain
