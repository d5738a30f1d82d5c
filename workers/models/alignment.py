"""Weights where products begin at whole cache lines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LINE = 64  # bytes; PyTorch's own CPU memory begins at multiples of it


def align(model: nn.Module) -> None:
    """Copy CPU weights that lie elsewhere, as those do that are mapped from a file.

    A product may be summed in another order where a matrix does not begin at a whole line, so the same weights would give
    other last bits in the model as it was loaded than in one that a policy or an export wrote. Tied weights stay tied.
    """
    made: dict[tuple[Any, ...], Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or tensor.device.type != "cpu" or not tensor.numel() or tensor.data_ptr() % LINE == 0:
                    continue
                key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                if key not in made:
                    made[key] = tensor.detach().clone(memory_format=torch.preserve_format)
                if isinstance(tensor, nn.Parameter):
                    tensor.data = made[key]
                else:
                    held[name] = made[key]
