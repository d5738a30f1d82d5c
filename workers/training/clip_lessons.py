"""Teaching a scene model to read several frames, whole and pooled, and what it then scores.

The questions about one clip stand behind its frames in one sequence, and each sees the frames and itself only.
How many frames are whole, and what of all is pooled, is drawn anew every step: few tokens teach as much as all of them.

Shapes: B clips, T frames, C cells of a frame (12 x 12), I image tokens, S sequence, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workers.data.clips import CLIP_KINDS, Clip, ask_clip, held_out_clip
from workers.mechanisms.frame_pooling import averaged, widest
from workers.training.scene_lessons import IGNORED, PATCH, VIEW, normalized
from workers.training.scene_scores import answered, prompt

SIDE = VIEW // PATCH
ASKED = 3  # questions of each kind about a clip
MOST_WHOLE, MOST_POOLED = 3, 4  # whole frames, and cells an edge of a pooled one
NARROWED = 0.25  # share of steps in which the columns of whole frames are pooled in pairs
CLIPS = 300


@dataclass(frozen=True)
class Reading:
    """How a step reads its clips: whole frames in the order of time (``columns`` to one), then all frames pooled.

    Attributes:
        whole: [B, n] frames that are whole, ascending.
        side: cells an edge of a pooled frame; 0 = none are pooled.
    """

    whole: Tensor
    columns: int = 1
    side: int = 0

    def tokens(self, features: Tensor) -> Tensor:
        """Frames [B, T, C, D] as the language model reads them: [B, I, D]."""
        b, _, _, d = features.shape
        cells = features.unflatten(2, (SIDE, SIDE))
        rows = torch.arange(b)[:, None]
        parts = [widest(cells[rows, self.whole].flatten(0, 1), self.columns).reshape(b, -1, d)]
        if self.side:
            parts.append(averaged(cells.flatten(0, 1), self.side).reshape(b, -1, d))
        return torch.cat(parts, 1)


def all_whole(clips: int, frames: int) -> Reading:
    """Every frame as it is."""
    return Reading(torch.arange(frames).expand(clips, -1))


def drawn_reading(rng: np.random.Generator, clips: int, frames: int) -> Reading:
    """A few whole frames, and mostly all frames pooled."""
    whole = int(rng.integers(1, MOST_WHOLE + 1))
    chosen = np.stack([np.sort(rng.permutation(frames)[:whole]) for _ in range(clips)])
    columns = 2 if rng.random() < NARROWED else 1
    return Reading(torch.from_numpy(chosen), columns, int(rng.integers(0, MOST_POOLED + 1)))


@dataclass
class ClipBatch:
    """Questions about clips, without the image tokens: ids, targets and block [B, Q]; block -2 = padding."""

    ids: Tensor
    targets: Tensor
    block: Tensor
    places: Tensor  # within the question


def questions_about(clips: Sequence[Clip], tokenizer: Any, rng: np.random.Generator) -> ClipBatch:
    """A few questions of each kind about each clip, and their answers."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    rows: list[list[tuple[int, int, int, int]]] = []  # (id, target, block, place) of every word
    for clip in clips:
        row: list[tuple[int, int, int, int]] = []
        for n, kind in enumerate(CLIP_KINDS * ASKED):
            asked = ask_clip(clip, kind, rng, clip.visits)
            if asked is None:
                continue
            words = [*(vocabulary[w] for w in asked.text.split()), vocabulary["assistant"], vocabulary[asked.answer]]
            targets = [*[IGNORED] * (len(words) - 2), words[-1], tokenizer.eos_token_id]
            row += [(w, t, n, i) for i, (w, t) in enumerate(zip(words, targets, strict=True))]
        rows.append(row)
    longest = max(map(len, rows))
    padding = (tokenizer.pad_token_id, IGNORED, -2, 0)
    table = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    return ClipBatch(*table.unbind(-1))


def reading_loss(model: Any, batch: ClipBatch, tokens: Tensor, start: Sequence[int]) -> Tensor:
    """How well the answers behind image tokens [B, I, D] are predicted.

    Args:
        start: ids before the image.
    """
    b, images = tokens.shape[:2]
    prefix = len(start) + images
    table = model.get_input_embeddings()
    head = table(torch.tensor(start)).expand(b, -1, -1)
    embedded = torch.cat([head, tokens.to(head.dtype), table(batch.ids)], 1)
    positions = torch.cat([torch.arange(prefix).expand(b, -1), prefix + batch.places], 1)
    block = torch.cat([torch.full((b, prefix), -1), batch.block], 1)
    causal = torch.ones(block.shape[1], block.shape[1], dtype=torch.bool).tril()
    allowed = causal & ((block[:, :, None] == block[:, None, :]) | (block == -1)[:, None, :])
    mask = torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill(~allowed, torch.finfo(torch.bfloat16).min)[:, None]
    out = model.model.language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state[:, prefix:]
    told = batch.targets != IGNORED
    return nn.functional.cross_entropy(model.lm_head(out[told]).float(), batch.targets[told])


def frames_seen(model: Any, clips: Sequence[Clip]) -> Tensor:
    """What the projector makes of all frames: [B, T, C, D]. Frames that are alike are seen once."""
    frames = [frame for clip in clips for frame in clip.frames]
    seen = {frame: n for n, frame in enumerate(dict.fromkeys(frames))}
    images = normalized(np.stack([np.asarray(frame.image) for frame in seen])).to(model.dtype)
    features = model.model.get_image_features(pixel_values=images, return_dict=True).pooler_output
    return torch.stack(list(features))[[seen[frame] for frame in frames]].unflatten(0, (len(clips), -1))


@torch.inference_mode()
def score_clips(
    model: Any, processor: Any, seed: int, say: Callable[[str, float | None], None] = lambda text, done: None, clips: int = CLIPS
) -> tuple[dict[str, float], int]:
    """Accuracy by kind of question about clips that no training draws, blind, and with every frame pooled to 2 x 2.

    Returns:
        (metric -> value, number of questions).
    """
    right: dict[str, list[bool]] = {"": [], "blind ": [], "pooled ": []}
    kinds: list[str] = []
    for n in range(clips):
        clip, asked = held_out_clip(seed, n)
        kinds += [q.kind for q in asked]
        answers = [q.answer for q in asked]
        features = frames_seen(model, [clip])
        whole = all_whole(1, clip.length)
        given = {"": whole, "pooled ": Reading(whole.whole[:, :0], 1, 2), "blind ": None}
        for condition, reading in given.items():
            texts = [prompt(processor, q.text, reading is not None) for q in asked]
            tokens = None if reading is None else reading.tokens(features)[0]
            if tokens is not None:
                texts = [t.replace(processor.image_token, processor.image_token * len(tokens)) for t in texts]
            found = processor.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            right[condition] += answered(model, processor, found["input_ids"], found["attention_mask"], tokens, answers)
        say(f"scoring: {n + 1} of {clips} clips", n / clips)
    scores = {f"{condition}accuracy": float(np.mean(values)) for condition, values in right.items()}
    for kind in CLIP_KINDS:
        scores[kind] = float(np.mean([r for r, k in zip(right[""], kinds, strict=True) if k == kind]))
    return scores, len(kinds)
