"""How well a model answers about scenes that it never saw: with the image, blind, and with few image tokens.

Measured by the library's own forward, one question a sequence: nothing of the studio's engine is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.data.scenes import KINDS, Question, Scene, held_out_scene

SCENES = 300
DROPPED = 0.9


def held_out(size: int, scenes: int = SCENES) -> list[tuple[Scene, Question]]:
    """Scenes of one size in pixels, each with one question of every kind."""
    out = []
    for n in range(scenes):
        scene, questions = held_out_scene(size, n)
        out += [(scene, q) for q in questions]
    return out


def scenes_for(examples: int | None) -> int:
    """How many scenes give about so many questions; all for None."""
    return SCENES if examples is None else max(1, examples // len(KINDS))


@torch.inference_mode()
def score_scenes(
    model: Any,
    processor: Any,
    say: Callable[[str, float | None], None] = lambda text, done: None,
    scenes: int = SCENES,
    size: int = 96,
) -> tuple[dict[str, float], int]:
    """Accuracy by kind of question, blind accuracy, and accuracy without 90 % of the image tokens drawn at random.

    Returns:
        (metric -> value, number of questions).
    """
    pairs = held_out(size, scenes)
    right = {"": [], "blind ": [], "dropped ": []}  # type: dict[str, list[bool]]
    for start in range(0, len(pairs), len(KINDS)):
        rows = pairs[start : start + len(KINDS)]
        scene = rows[0][0]
        texts = [prompt(processor, q.text, True) for _, q in rows]
        inputs = processor(images=[scene.image] * len(rows), text=texts, return_tensors="pt", padding=True)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        keep = kept_at_random(inputs, model.config.image_token_id, start)
        blind = processor.tokenizer(
            [prompt(processor, q.text, False) for _, q in rows], return_tensors="pt", padding=True, add_special_tokens=False
        )
        answers = [q.answer for _, q in rows]
        features = model.model.get_image_features(
            pixel_values=inputs["pixel_values"][:1],
            **({"image_sizes": inputs["image_sizes"][:1]} if "image_sizes" in inputs else {}),
            return_dict=True,
        ).pooler_output[0]
        right[""] += answered(model, processor, inputs["input_ids"], inputs["attention_mask"], features, answers)
        right["dropped "] += answered(
            model, processor, *(inputs[k][:, keep[0]] for k in ("input_ids", "attention_mask")), features[keep[1]], answers
        )
        right["blind "] += answered(model, processor, blind["input_ids"], blind["attention_mask"], None, answers)
        say(f"scoring: {start + len(rows)} of {len(pairs)} questions", start / len(pairs))
    scores = {}
    for condition, values in right.items():
        scores[f"{condition}accuracy"] = float(np.mean(values))
        if condition != "dropped ":
            for i, kind in enumerate(KINDS):
                scores[f"{condition}{kind}"] = float(np.mean(values[i :: len(KINDS)]))
    return scores, len(pairs)


def prompt(processor: Any, text: str, with_image: bool) -> str:
    """The question in the model's chat form."""
    content = [{"type": "image"}] * with_image + [{"type": "text", "text": text}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def kept_at_random(inputs: Any, image_token: int, seed: int) -> tuple[Tensor, Tensor]:
    """Columns of the sequence and rows of the image features that stay when 90 % are dropped.

    The columns are the same in every row: left padding puts the image elsewhere, so rows are cut from the right.
    """
    ids = inputs["input_ids"]
    is_image = ids == image_token
    total = int(is_image[0].sum())
    keep = np.sort(np.random.default_rng(seed).permutation(total)[: max(1, round(total * (1 - DROPPED)))])
    first = is_image.float().argmax(1)
    if len(set(first.tolist())) > 1:
        raise ValueError("questions of one batch must be padded on the right")
    columns = [c for c in range(ids.shape[1]) if not is_image[0, c]]
    chosen = sorted([*columns, *(int(first[0]) + int(k) for k in keep)])
    return torch.tensor(chosen), torch.from_numpy(keep)


def answered(model: Any, processor: Any, ids: Tensor, mask: Tensor, features: Tensor | None, answers: list[str]) -> list[bool]:
    """Whether the likeliest next word is the answer, for each row."""
    embedded = model.get_input_embeddings()(ids)
    if features is not None:
        at = ids == model.config.image_token_id
        embedded = embedded.masked_scatter(
            at[..., None].expand_as(embedded), features.to(embedded.dtype).expand(len(ids), -1, -1)
        )
    logits = model(inputs_embeds=embedded, attention_mask=mask).logits
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    words = processor.tokenizer.convert_ids_to_tokens(logits[torch.arange(len(ids)), last].argmax(-1).tolist())
    return [w == a for w, a in zip(words, answers, strict=True)]
