"""Where image tokens lie, against images whose colours are coordinates and against the library's own models.

The oracle knows nothing of resizing and cropping: an image whose red grows from left to right and whose green grows from top
to bottom goes through the real image processor, and the mean colours of what a token is made of say what it saw. Blue is full
everywhere in the image, so its lack is padding. Which pixels a token is made of is itself checked by changing them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
)

from studio_state.errors import Unavailable
from tests import tiny, tiny_vision
from tests.methods.driving import load as load_language_model
from workers.families.image_layout import ImageLayout, image_layout

READERS: dict[str, tuple[Callable[[], Path], int]] = {  # how many pixels along an edge one token stands for
    "llava": (tiny_vision.llava_folder, 8),
    "llava-next": (tiny_vision.llava_next_folder, 8),
    "idefics3": (tiny_vision.idefics3_folder, 16),
    "smolvlm": (tiny_vision.smolvlm_folder, 16),
    "qwen2.5-vl": (tiny_vision.qwen2_5_vl_folder, 16),
}
ENCODERS: dict[str, tuple[Callable[[], Path], int]] = {
    "vit": (tiny_vision.vit_folder, 4),
    "deit": (tiny_vision.deit_folder, 4),
    "deit-teacher": (lambda: tiny_vision.deit_folder(teacher=True), 4),
    "dinov2": (tiny_vision.dinov2_folder, 7),
    "dinov2-classifier": (lambda: tiny_vision.dinov2_folder(classifier=True), 7),
    "clip-vision": (tiny_vision.clip_vision_folder, 8),
}
SIZES = [(640, 480), (480, 640), (100, 100), (1500, 500), (211, 37), (33, 500), (1500, 20)]  # width, height
VISUAL = ("pixel_values", "image_sizes", "pixel_attention_mask", "image_grid_thw")


@cache
def model_of(name: str) -> Any:
    folder = {**READERS, **ENCODERS}[name][0]()
    architecture = AutoConfig.from_pretrained(folder).architectures[0]
    auto: Any = AutoModelForImageTextToText if name in READERS else AutoModel
    if "Classification" in architecture:
        auto = AutoModelForImageClassification
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == architecture
    return model


@cache
def image_processor_of(name: str) -> Any:
    return AutoImageProcessor.from_pretrained({**READERS, **ENCODERS}[name][0]())  # type: ignore[no-untyped-call]


def coordinates(width: int, height: int) -> Image.Image:
    """Red = how far to the right, green = how far down, blue = inside."""
    pixels = np.full((height, width, 3), 255.0)
    pixels[..., 0] = (np.arange(width) + 0.5) / width * 255
    pixels[..., 1] = ((np.arange(height) + 0.5) / height * 255)[:, None]
    return Image.fromarray(pixels.round().astype(np.uint8))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Large spots of all colours."""
    spots = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC)


def asked(name: str, image: Image.Image) -> Mapping[str, Any]:
    """What the processor makes of a chat about the image."""
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    return tiny_vision.processor_of(READERS[name][0]()).apply_chat_template(  # type: ignore[no-any-return]
        [{"role": "user", "content": parts}], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


def by_cell(inputs: Mapping[str, Any], edge: int) -> Tensor:
    """Views of the pixel values by cell: [P * T, 3, pixels], views in their order and cells in reading order."""
    pixels: Tensor = inputs["pixel_values"]
    if "image_grid_thw" in inputs:  # patches in groups of four; both frames of a patch are the same picture
        return pixels.view(-1, 4, 3, 2, (edge // 2) ** 2).permute(0, 2, 1, 3, 4).flatten(2)
    pixels = pixels.view(-1, *pixels.shape[-3:])
    return pixels.unfold(2, edge, edge).unfold(3, edge, edge).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(2)


def assert_tokens_see_their_boxes(
    layout: ImageLayout, inputs: Mapping[str, Any], image_processor: Any, edge: int, size: tuple[int, int]
) -> None:
    """The oracle."""
    mean, std = (torch.tensor(x)[:, None] for x in (image_processor.image_mean, image_processor.image_std))
    colours = (by_cell(inputs, edge) * std + mean).mean(-1)  # [P * T, 3], 0..1
    assert len(layout.boxes) == len(layout.views) == len(layout.rows)
    compared = 0
    for box, row in zip(layout.boxes, layout.rows, strict=True):
        if row == -1:
            assert box == []
            continue
        right, down, inside = colours[row].tolist()
        if not box:
            assert inside < 1e-3
        elif inside > 0.1:  # of less, rounding to whole colours leaves too little
            left, top, far_right, bottom = (x / 10_000 for x in box)
            for centre, seen, at_side in (
                ((left + far_right) / 2, right / inside, left == 0 or far_right == 1),
                ((top + bottom) / 2, down / inside, top == 0 or bottom == 1),
            ):
                assert centre == pytest.approx(seen, abs=0.025 if at_side else 0.015), (size, row, box)
            compared += 1
        else:
            assert inside > 0
    assert compared > len(layout.boxes) // 3


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", [*READERS, *ENCODERS])
def test_every_token_sees_what_its_box_says(name: str, size: tuple[int, int]) -> None:
    image_processor = image_processor_of(name)
    inputs = image_processor(coordinates(*size), return_tensors="pt")
    layout = image_layout(model_of(name), inputs, *size, image_processor)
    assert_tokens_see_their_boxes(layout, inputs, image_processor, {**READERS, **ENCODERS}[name][1], size)
    assert set(layout.views) <= set(range(layout.tiles[0] * layout.tiles[1] + 1))


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", READERS)
def test_tokens_are_as_many_and_in_the_order_of_the_features(name: str, size: tuple[int, int]) -> None:
    model, inputs = model_of(name), asked(name, noise(*size))
    layout = image_layout(model, inputs, *size, image_processor_of(name))
    packed, made = features(model, inputs)
    assert len(layout.boxes) == int((inputs["input_ids"] == model.config.image_token_id).sum()) == len(packed)
    rows = torch.tensor(layout.rows)
    assert torch.equal(made.flatten(0, -2)[rows[rows >= 0]], packed[rows >= 0])
    if (rows < 0).any():
        assert name == "llava-next"
        assert (packed[rows < 0] == model.model.image_newline).all()
    assert made.flatten(0, -2).shape[0] == layout.side[0] * layout.side[1] * (layout.tiles[0] * layout.tiles[1] + 1)


@torch.inference_mode()
def features(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What the language model reads [n, D], and what the projector made before."""
    made: list[Any] = []
    parts = model.model
    part: nn.Module
    if hasattr(parts, "visual"):  # its merger's own output is still sorted by window
        part = parts.visual
    else:
        part = getattr(parts, "multi_modal_projector", None) or parts.connector
    hook = part.register_forward_hook(lambda _, args, out: made.append(getattr(out, "pooler_output", out)))
    packed = model.get_image_features(**{k: inputs[k] for k in VISUAL if k in inputs}).pooler_output
    hook.remove()
    assert len(packed) == 1
    return packed[0], made[0]


@pytest.mark.parametrize("name", READERS)
def test_a_token_is_made_of_the_pixels_of_its_row(name: str) -> None:
    """Changing them changes that token most."""
    model, inputs = model_of(name), dict(asked(name, noise(640, 480)))
    layout = image_layout(model, inputs, 640, 480, image_processor_of(name))
    before, _ = features(model, inputs)
    tokens = [t for t, row in enumerate(layout.rows) if row >= 0]
    for token in np.random.default_rng(0).choice(tokens, 16, replace=False):
        after, _ = features(model, {**inputs, "pixel_values": changed(inputs, layout.rows[token], READERS[name][1])})
        assert int((after - before).norm(dim=-1).argmax()) == token


def changed(inputs: Mapping[str, Any], cell: int, edge: int) -> Tensor:
    """Pixel values with one cell inverted."""
    pixels: Tensor = inputs["pixel_values"].clone()
    if "image_grid_thw" in inputs:
        pixels[4 * cell : 4 * cell + 4] *= -1
        return pixels
    views = pixels.view(-1, *pixels.shape[-3:])
    across = pixels.shape[-1] // edge
    view, place = divmod(cell, across * (pixels.shape[-2] // edge))
    row, column = divmod(place, across)
    views[view, :, row * edge : (row + 1) * edge, column * edge : (column + 1) * edge] *= -1
    return pixels


@pytest.mark.parametrize("name", ENCODERS)
@torch.inference_mode()
def test_tokens_of_an_encoder_are_its_patches(name: str) -> None:
    model, image_processor = model_of(name), image_processor_of(name)
    inputs = image_processor(noise(640, 480), return_tensors="pt")
    layout = image_layout(model, inputs, 640, 480, image_processor)
    before = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
    first = 2 if name.startswith("deit") else 1  # CLS, and DeiT's distillation token
    assert layout.rows == list(range(len(before) - first))
    for token in (0, 9, len(layout.rows) - 1):
        pixels = changed(inputs, token, ENCODERS[name][1])
        after = model(pixels, output_hidden_states=True).hidden_states[-1][0]
        assert int((after - before)[first:].norm(dim=-1).argmax()) == token


def test_views_are_numbered_as_a_person_counts_them() -> None:
    """Idefics3 encodes the whole image last, LLaVA-NeXT first; on the screen it is view 0, and tiles follow in reading order."""
    for name, tiles in (("idefics3", (3, 4)), ("smolvlm", (3, 4)), ("llava-next", (2, 2))):
        image_processor = image_processor_of(name)
        inputs = image_processor(coordinates(640, 480), return_tensors="pt")
        layout = image_layout(model_of(name), inputs, 640, 480, image_processor)
        assert layout.tiles == tiles
        assert covered(layout, 0) == [0, 0, 10_000, 10_000]
        assert covered(layout, 1)[:2] == [0, 0]
        assert covered(layout, tiles[1])[1:3] == [0, 10_000]
        assert covered(layout, tiles[0] * tiles[1])[2:] == [10_000, 10_000]
    last = layout.rows.index(-1)
    assert layout.views[last] == layout.views[last - 1] == 2


def covered(layout: ImageLayout, view: int) -> list[int]:
    """The part of the image that all tokens of a view lie in."""
    boxes = [b for b, v in zip(layout.boxes, layout.views, strict=True) if v == view and b]
    return [f(b[i] for b in boxes) for i, f in enumerate((min, min, max, max))]


def test_what_is_cut_away_is_in_no_box() -> None:
    image_processor = image_processor_of("llava")
    inputs = image_processor(coordinates(1500, 500), return_tensors="pt")
    layout = image_layout(model_of("llava"), inputs, 1500, 500, image_processor)
    assert (layout.side, layout.tiles, set(layout.views)) == ((8, 8), (0, 0), {0})
    assert covered(layout, 0) == [3333, 0, 6667, 10_000]


@pytest.mark.parametrize("size", [(301, 100), (100, 301), (50, 101), (101, 50), (41, 39), (90, 91)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(
    "image_processor",
    [
        LlavaImageProcessorPil(
            size={"height": 64, "width": 64}, crop_size={"height": 64, "width": 64}, do_pad=True, image_mean=[0.0] * 3
        ),  # it pads with the mean, here black
        CLIPImageProcessorPil(do_resize=False, crop_size={"height": 64, "width": 64}),
        CLIPImageProcessorPil(size={"shortest_edge": 75}, crop_size={"height": 70, "width": 61}),
        CLIPImageProcessorPil(size={"height": 45, "width": 77}, do_center_crop=False),
    ],
    ids=["squared by padding", "not resized", "patches leave a rest", "stretched"],
)
def test_other_settings_of_the_image_processor(image_processor: Any, size: tuple[int, int]) -> None:
    inputs = image_processor(coordinates(*size), return_tensors="pt")
    layout = image_layout(model_of("llava"), inputs, *size, image_processor)
    assert_tokens_see_their_boxes(layout, inputs, image_processor, 8, size)


@pytest.mark.parametrize("size", [(640, 480), (300, 1000), (60, 50), (900, 150)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"longest_edge": 200}},
        {"size": {"longest_edge": 64}},
        {"size": {"height": 100, "width": 180}},
        {"do_image_splitting": False},
        {"do_resize": False},
    ],
    ids=lambda c: next(iter(c)),
)
def test_other_settings_of_tiles(changes: dict[str, Any], size: tuple[int, int]) -> None:
    image_processor = AutoImageProcessor.from_pretrained(READERS["smolvlm"][0](), **changes)  # type: ignore[no-untyped-call]
    inputs = image_processor(coordinates(*size), return_tensors="pt", return_row_col_info=True)
    layout = image_layout(model_of("smolvlm"), inputs, *size, image_processor)
    assert_tokens_see_their_boxes(layout, inputs, image_processor, 16, size)
    assert layout.tiles == (inputs.pop("rows")[0][0], inputs.pop("cols")[0][0])
    assert image_layout(model_of("smolvlm"), inputs, *size, image_processor) == layout


def test_what_is_not_known_is_refused_in_one_sentence() -> None:
    image_processor = image_processor_of("llava")
    inputs = image_processor(coordinates(640, 480), return_tensors="pt")
    next_inputs = image_processor_of("llava-next")(coordinates(640, 480), return_tensors="pt")
    with pytest.raises(Unavailable, match="a token of LlamaForCausalLM shows; known are the model types llava, "):
        image_layout(load_language_model(tiny.llama_folder()), inputs, 640, 480, image_processor)
    with pytest.raises(Unavailable, match="makes 64 x 64 pixels of this image, but 32 x 32 were given"):
        image_layout(model_of("llava"), {"pixel_values": torch.zeros(1, 3, 32, 32)}, 640, 480, image_processor)
    with pytest.raises(Unavailable, match="of an image of 640 x 480 pixels, not of 480 x 640"):
        image_layout(model_of("llava-next"), next_inputs, 480, 640, image_processor_of("llava-next"))
    with pytest.raises(Unavailable, match="resizes by longest_edge, shortest_edge, and where"):
        image_layout(model_of("vit"), inputs, 640, 480, CLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 80}))
    image_processor = image_processor_of("idefics3")
    inputs = image_processor(coordinates(640, 480), return_tensors="pt")
    with pytest.raises(Unavailable, match="gives 4 x 4 tiles and one view of the whole, but 13 views were given"):
        image_layout(model_of("idefics3"), inputs, 480, 470, image_processor)


def test_a_tower_whose_cls_token_is_read_is_refused() -> None:
    model = AutoModelForImageTextToText.from_pretrained(READERS["llava"][0](), vision_feature_select_strategy="full")
    image_processor = image_processor_of("llava")
    inputs = image_processor(coordinates(64, 64), return_tensors="pt")
    with pytest.raises(Unavailable, match=r"tower of type clip_vision_model \(features: full\)"):
        image_layout(model, inputs, 64, 64, image_processor)
