"""Weights of a loaded model begin at whole cache lines, and are what they were."""

from __future__ import annotations

import torch
from torch import nn

from tests import tiny
from workers.models.alignment import LINE, align
from workers.models.load import load_model
from workers.models.resolve import resolve


def test_weights_that_lie_elsewhere_are_copied_and_ties_stay() -> None:
    room = torch.arange(1000.0)
    first, second = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)
    first.weight = second.weight = nn.Parameter(room[1:13].view(3, 4))
    second.bias = nn.Parameter(room[16:19])
    second.register_buffer("turned", room[5:11].view(2, 3).T)
    place = second.bias.data_ptr()
    both = nn.Sequential(first, second)
    align(both)
    assert all(t.data_ptr() % LINE == 0 for t in (*both.parameters(), *both.buffers()))
    assert first.weight is second.weight
    assert torch.equal(first.weight.flatten(), room[1:13])
    assert second.turned.stride() == (1, 3)
    assert torch.equal(second.turned, room[5:11].view(2, 3).T)
    assert second.bias.data_ptr() == place


def test_a_loaded_model_is_aligned() -> None:
    model = load_model(resolve(str(tiny.llama_folder())), torch.float32).model
    assert {p.data_ptr() % LINE for p in model.parameters()} == {0}
