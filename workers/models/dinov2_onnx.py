"""DINOv2-small with a saliency head, out of an ONNX file: an ordinary Dinov2Model, the head beside it.

The exporter kept most names of the weights, but not all: a linear map became a product with a nameless matrix
(``onnx::MatMul_1966``), and the position embeddings were cut into that of CLS and those of the patches. Matrices are
named through the bias that is added to their product, the two others through their shape. All values are kept bit for bit.

The publisher's own preparation scales the longer edge to 224 and pads the shorter one with black. Here an image is
stretched to 224 x 224, so that a map and the tokens cover the whole image and nothing but it. Measured on the five
photos that come with gradio: the maps correlate 0.96 to 1.00 with those of the publisher's preparation. On one wide
screenshot they do not correlate at all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from studio_state.errors import ModelError
from workers.models.onnx_file import OnnxGraph, read_onnx
from workers.models.saliency import HEAD_FILE, SaliencyHead, fill, misfits

SIDE = 224  # of the images that the weights were fine-tuned on
CONFIG: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,  # of the images that the position embeddings are for; they are interpolated
    "patch_size": 14,
    "use_mask_token": False,  # needed in pre-training only, and not in the file
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_ENCODER, _HEAD = "backbone.", "decoder."
_RENAMED = {  # transformers 5 has shorter names for the attention
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
_PATTERN = re.compile("|".join(map(re.escape, _RENAMED)))


def read(file: Path) -> tuple[Dinov2Model, dict[str, Tensor]]:
    """The encoder, and the weights of its saliency head by their names in :class:`SaliencyHead`.

    Raises:
        ModelError: a damaged file, or one of another model.
    """
    graph = read_onnx(file)
    weights, head = _encoder(graph), _named(graph, _HEAD)
    with torch.device("meta"):
        model, expected_head = Dinov2Model(Dinov2Config(**CONFIG)), SaliencyHead()
    if wrong := misfits(weights, model) or misfits(head, expected_head):
        raise ModelError(f"{file.name} is not a DINOv2-small with a saliency head: {wrong}; choose another model")
    return fill(model, weights), head


def save(model: Dinov2Model, head: dict[str, Tensor], folder: Path) -> None:
    """Write config, float32 safetensors, the head's weights and the settings of the image processor into a folder."""
    model.save_pretrained(folder)
    save_file(head, folder / HEAD_FILE, metadata={"format": "pt"})
    BitImageProcessorPil(
        do_center_crop=False,
        size={"height": SIDE, "width": SIDE},
        resample=2,  # bilinear
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    ).save_pretrained(folder)


def _encoder(graph: OnnxGraph) -> dict[str, Tensor]:
    """The encoder's weights by the library's names."""
    found = _named(graph, _ENCODER)
    makers = {output: node for node in graph.nodes for output in node.outputs}
    for node in graph.nodes:
        if node.op != "Add" or len(node.inputs) != 2:
            continue
        for product, bias in (node.inputs, node.inputs[::-1]):
            maker = makers.get(product)
            if maker is None or maker.op != "MatMul" or not (bias.startswith(_ENCODER) and bias.endswith(".bias")):
                continue
            for name in maker.inputs:
                if name in graph.tensors:
                    found[bias.removeprefix(_ENCODER).removesuffix("bias") + "weight"] = _tensor(graph.tensors[name].T)
    width, patches = CONFIG["hidden_size"], (CONFIG["image_size"] // CONFIG["patch_size"]) ** 2
    parts = [
        [t for name, t in graph.tensors.items() if not name.startswith(_ENCODER) and t.shape == (1, count, width)]
        for count in (1, patches)
    ]
    if all(len(part) == 1 for part in parts):
        found["embeddings.position_embeddings"] = _tensor(np.concatenate([part[0] for part in parts], axis=1))
    return {_PATTERN.sub(lambda m: _RENAMED[m[0]], name): weight for name, weight in found.items()}


def _named(graph: OnnxGraph, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): _tensor(t) for name, t in graph.tensors.items() if name.startswith(prefix)}


def _tensor(values: NDArray[np.float32]) -> Tensor:
    """A copy that may be written to, in reading order."""
    return torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
