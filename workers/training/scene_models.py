"""Scene models at hand for training: the trained one that others start from, and what prepares images for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from studio_state.errors import StudioError
from workers.training.scene_lessons import PATCH, VIEW
from workers.training.word_tokenizer import IMAGE

TOKENS = (VIEW // PATCH) ** 2  # of one view
SETTLED = 0.99  # decay of the average in a last phase


def scene_model(folder: Path) -> tuple[Any, Any]:
    """A trained scene model in float32, and its tokenizer.

    Raises:
        StudioError: the folder holds none.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    if not (folder / "config.json").is_file():
        raise StudioError(f"{folder} holds no trained scene-vlm; train it first: pareto-studio train scene-vlm --out DIR")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model, AutoProcessor.from_pretrained(folder).tokenizer


def processor(tokenizer: Any) -> Any:
    """Images to 96 x 96, questions to words."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil(
        size={"shortest_edge": VIEW}, crop_size={"height": VIEW, "width": VIEW}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    )
