"""Where in a person's image each image token lies.

A model reads an image as a row of tokens: squares of the whole image, of tiles of it, or both, after the
image was resized, cropped or padded. This file follows an image through the preparation of each architecture
and says, token by token, which part of the original the token saw. Nothing is run but the shapes.

Shapes: P views in one batch of the vision encoder, T cells of one view (a cell = what becomes one token), D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

from studio_state.errors import Unavailable
from workers.data.pictures import sheet
from workers.families.image_views import WHOLE, Sides, View, box_of, fractions, framed, padded, pair, patched, tiled, within

NEWLINE = -1  # among rows: a token that ends a line of tokens and shows nothing


@dataclass(frozen=True)
class ImageLayout:
    """The image tokens of one image, in the order in which the language model reads them.

    That is the order of ``get_image_features(...).pooler_output[i]`` and of the image placeholders in the input ids;
    for a plain encoder, the order of its patch tokens, those before them (CLS, distillation) not counted.

    Attributes:
        boxes: per token [left, top, right, bottom] in ten-thousandths of the upright original image, cut at its sides;
            [] for a token without a place in it (a newline of LLaVA-NeXT, a cell of nothing but padding).
        views: per token which view it is from: 0 = the whole image, 1.. = tiles in reading order. A newline has
            the view of the token before it.
        rows: per token the index of its features among those that the projector made, before they were packed:
            ``view in the encoder's batch * T + cell`` ([P, T, D] flattened to [P * T, D]), -1 for a newline.
        side: (rows, columns) of the cells of one view.
        tiles: (rows, columns) of the grid of tiles, (0, 0) where there is one view only.
        frames: of a clip, whose tokens stand one frame after the other; boxes are then in the picture that shows them all.
    """

    boxes: list[list[int]]
    views: list[int]
    rows: list[int]
    side: Sides
    tiles: Sides
    frames: int = 1


def image_layout(model: Any, inputs: Mapping[str, Any], width: int, height: int, image_processor: Any) -> ImageLayout:
    """Where each token of an image lies.

    Args:
        model: a vision-language model or a plain encoder of :data:`READERS`.
        inputs: what the processor made of this one image: ``pixel_values`` and the tensors beside it, batch of 1.
        width, height: of the upright original, in pixels.
        image_processor: the one that made ``inputs``, with the same settings.

    Raises:
        Unavailable: another architecture, a vision tower or a way to resize that is not known here, or inputs that the
            image processor does not make of an image of this size.
    """
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind not in READERS:
        raise Unavailable(
            f"it is not known which part of an image a token of {type(model).__name__} shows; "
            f"known are the model types {', '.join(READERS)}"
        )
    return READERS[kind](model, inputs, width, height, image_processor)


def clip_layout(frame: ImageLayout, frames: int) -> ImageLayout:
    """The layout of a clip from that of one of its frames, which are alike in size; of one frame as it is."""
    if frames == 1:
        return frame
    columns, lines = sheet(frames)
    places = tiled(WHOLE, (lines, columns))[:frames]
    boxes = [box_of(within(place, fractions(box))) if box else [] for place in places for box in frame.boxes]
    given = (max(frame.rows) // (frame.side[0] * frame.side[1]) + 1) * frame.side[0] * frame.side[1]
    rows = [row if row == NEWLINE else row + f * given for f in range(frames) for row in frame.rows]
    return replace(frame, boxes=boxes, views=frame.views * frames, rows=rows, frames=frames)


def _one_view(model: Any, inputs: Mapping[str, Any], width: int, height: int, image_processor: Any) -> ImageLayout:
    """ViT, DeiT, DINOv2, CLIP, and LLaVA on such a tower: one token a patch."""
    tower, pixels = _tower(model.config), _pixels(inputs)
    view, side = patched(framed(width, height, pixels, image_processor), pixels, tower.patch_size)
    return _laid_out([view], [0], side)


def _llava_next(model: Any, inputs: Mapping[str, Any], width: int, height: int, image_processor: Any) -> ImageLayout:
    """LLaVA-NeXT: the whole image squeezed into a square, then tiles of it, padded to the grid that wastes least.

    Which cells of the tiles stay, and where lines end, is asked of the model itself: it packs indices instead of features.

    Raises:
        Unavailable: the inputs are of an image of another size.
    """
    given_height, given_width = inputs["image_sizes"][0].tolist()
    if (given_width, given_height) != (width, height):
        raise Unavailable(
            f"the inputs are of an image of {given_width} x {given_height} pixels, not of {width} x {height}; "
            "give what this image processor made of this image alone"
        )
    tower, pixels, size, crop = _tower(model.config), _pixels(inputs), image_processor.size, image_processor.crop_size
    edge = (crop and crop.height) or size.height or size.shortest_edge
    grid_height, grid_width = select_best_resolution((height, width), image_processor.image_grid_pinpoints)
    tiles = (grid_height // edge, grid_width // edge)
    inner_height, inner_width = get_patch_output_size(  # type: ignore[no-untyped-call]
        _stand_in(width, height), (grid_height, grid_width), input_data_format="channels_first"
    )
    across, down = padded(inner_width, grid_width), padded(inner_height, grid_height)
    square = (size.width or size.shortest_edge, size.height or size.shortest_edge)
    whole, side = patched(framed(*square, pixels, image_processor), pixels, tower.patch_size)
    part, _ = patched(framed(edge, edge, pixels, image_processor), pixels, tower.patch_size)
    views = [whole, *(within(tile, part) for tile in tiled((across, down), tiles))]
    count, cells = len(views), side[0] * side[1]
    indices = torch.arange(count * cells).view(count, cells, 1)  # whole numbers, so that none is rounded
    packed, _ = getattr(model, "model", model).pack_image_features(
        [indices],
        inputs["image_sizes"],
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        image_newline=torch.tensor([NEWLINE]),
    )
    return _laid_out(views, range(count), side, tiles, packed[0].flatten().tolist())


def _idefics3(model: Any, inputs: Mapping[str, Any], width: int, height: int, image_processor: Any) -> ImageLayout:
    """Idefics3, SmolVLM: the image stretched to a whole number of tiles, and itself once more after them.

    A token is a square of ``scale_factor`` x ``scale_factor`` patches, which lie side by side in reading order.

    Raises:
        Unavailable: the views are not as many as this image gives.
    """
    patch, factor = pair(model.config.vision_config.patch_size), model.config.scale_factor
    cell = (patch[0] * factor, patch[1] * factor)
    count = inputs["pixel_values"].shape[1]
    if inputs.get("rows") is not None:
        tiles = (int(inputs["rows"][0][0]), int(inputs["cols"][0][0]))
    else:
        tiles = _idefics3_tiles(width, height, image_processor)
    if count != tiles[0] * tiles[1] + 1:
        raise Unavailable(
            f"an image of {width} x {height} pixels gives {tiles[0]} x {tiles[1]} tiles and one view of the whole, but "
            f"{count} views were given; give what this image processor made of this image alone"
        )
    pixels = _pixels(inputs)
    whole, side = patched(WHOLE, pixels, cell)
    views = [*(patched(tile, pixels, cell)[0] for tile in tiled(WHOLE, tiles)), whole]
    return _laid_out(views, [*range(1, count), 0], side, tiles)


def _idefics3_tiles(width: int, height: int, image_processor: Any) -> Sides:
    """Rows and columns of tiles, (0, 0) for an image that is not split.

    The library's ``get_number_of_image_patches`` is another computation, which differs where the longest edge
    is not a multiple of the tile's.
    """
    if not image_processor.do_image_splitting:
        return 0, 0
    size, edge = image_processor.size, image_processor.max_image_size["longest_edge"]
    if image_processor.do_resize and size.longest_edge:
        height, width = get_resize_output_image_size(_stand_in(width, height), size.longest_edge)
    elif image_processor.do_resize:
        height, width = size.height, size.width
    aspect = width / height
    if width >= height:
        columns = math.ceil(width / edge)
        rows = math.ceil(int(columns * edge / aspect) / edge)
    else:
        rows = math.ceil(height / edge)
        columns = math.ceil(int(rows * edge * aspect) / edge)
    return (rows, columns) if rows * columns > 1 else (0, 0)


def _qwen2_5_vl(model: Any, inputs: Mapping[str, Any], width: int, height: int, image_processor: Any) -> ImageLayout:
    """Qwen2.5-VL: the image stretched to a whole number of tokens, ``spatial_merge_size`` squared patches each.

    Inside, the encoder sorts tokens by window; its result, to which ``rows`` points, is in reading order again.
    """
    merge = model.config.vision_config.spatial_merge_size
    _, rows, columns = inputs["image_grid_thw"].flatten().tolist()
    return _laid_out([WHOLE], [0], (rows // merge, columns // merge))


def _laid_out(
    views: Sequence[View], numbers: Sequence[int], side: Sides, tiles: Sides = (0, 0), rows: Iterable[int] | None = None
) -> ImageLayout:
    """The layout of views cut into cells.

    Args:
        views: where each view of the encoder's batch lies; numbers: what it is called on the screen.
        rows: order of the cells as the language model reads them, by default all as they come.
    """
    boxes = [box_of(cell) for view in views for cell in tiled(view, side)]
    order = list(range(len(boxes)) if rows is None else rows)
    shown: list[int] = []
    for row in order:
        shown.append(shown[-1] if row == NEWLINE else numbers[row // (side[0] * side[1])])
    return ImageLayout([[] if row == NEWLINE else list(boxes[row]) for row in order], shown, order, side, tiles)


def _stand_in(width: int, height: int) -> NDArray[np.uint8]:
    """An image [3, H, W] of this size that takes no memory, for functions of the library that ask only for its shape."""
    return np.broadcast_to(np.uint8(0), (3, height, width))


def _pixels(inputs: Mapping[str, Any]) -> Sides:
    """Height and width of a view."""
    height, width = inputs["pixel_values"].shape[-2:]
    return height, width


def _tower(config: Any) -> Any:
    """Config of the vision encoder; in a LLaVA it must be one of which a patch gives a token.

    Raises:
        Unavailable: another tower, or one whose CLS token is read too.
    """
    if not hasattr(config, "vision_config"):
        return config
    tower, strategy = config.vision_config, config.vision_feature_select_strategy
    if (tower.model_type, strategy) not in (("clip_vision_model", "default"), ("siglip_vision_model", "full")):
        raise Unavailable(
            f"it is not known which part of an image a token shows that {config.model_type} reads from a tower of type "
            f"{tower.model_type} (features: {strategy}); known are clip_vision_model (default) and siglip_vision_model (full)"
        )
    return tower


READERS: dict[str, Callable[[Any, Mapping[str, Any], int, int, Any], ImageLayout]] = {
    "llava": _one_view,
    "llava_next": _llava_next,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "qwen2_5_vl": _qwen2_5_vl,
    "vit": _one_view,
    "deit": _one_view,
    "dinov2": _one_view,
    "clip_vision_model": _one_view,
}
"""Model type -> how to read its layout."""
