"""A small text tower beside a trained vision tower, so that questions and frames can be compared: a CLIP model.

The vision tower is that of the scene model and stays as it is; the text tower and the two projections learn which
frames show what a question names, and which patches. A tower of the library's own kind (CLIP), so that its
checkpoint is read like any other.

Shapes: B questions and as many frames, P patches of a frame, E width of the common space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workers.data.clips import CLIP_KINDS, ClipQuestion, ask_clip, held_out_clip, make_clip, shows
from workers.data.scenes import Scene
from workers.training.scene_lessons import COVERED, PATCH, VIEW, normalized
from workers.training.word_tokenizer import BOS

END = "assistant"  # closes a question, as in the chat form; CLIP reads a text off where it ends
LONGEST_TEXT = 24


def scorer_model(tower: Any, tokenizer: Any, width: int) -> Any:
    """A CLIP model around a trained vision tower [its weights copied, fixed] with an untrained text tower."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": max(1, width // 32),
        "max_position_embeddings": LONGEST_TEXT,
        "projection_dim": width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=tower.config.to_dict(), projection_dim=width))
    model.vision_model.load_state_dict(tower.state_dict())
    model.vision_model.requires_grad_(False)
    return model


def scorer_tokenizer(tokenizer: Any) -> Any:
    """The words of the scene model, a question between a beginning and :data:`END`."""
    import copy

    from tokenizers.processors import TemplateProcessing

    ready = copy.deepcopy(tokenizer)
    marks = [(mark, ready.convert_tokens_to_ids(mark)) for mark in (BOS, END)]
    ready.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A {END}", special_tokens=marks)
    ready.chat_template = None
    return ready


def scored_pairs(rng: np.random.Generator, count: int) -> tuple[list[ClipQuestion], list[Scene]]:
    """Questions, each about something that can be seen, with a frame each that shows it."""
    questions: list[ClipQuestion] = []
    frames: list[Scene] = []
    while len(questions) < count:
        clip = make_clip(rng)
        for kind in CLIP_KINDS:
            asked = ask_clip(clip, kind, rng, clip.visits)
            if asked is not None and asked.visit is not None and len(questions) < count:
                questions.append(asked)
                frames.append(clip.frames[int(rng.integers(asked.visit.first, asked.visit.end))])
    return questions, frames


def scoring_loss(model: Any, tokenizer: Any, questions: Sequence[ClipQuestion], frames: Sequence[Scene]) -> Tensor:
    """How well questions find the frames that show what they name, frames their questions, and questions their patches."""
    text, image, patches = compared(model, tokenizer, [q.text for q in questions], normalized(pixels(frames)))
    fits = torch.tensor([[shows(f, q.words) for f in frames] for q in questions], dtype=torch.float32)
    scale = model.logit_scale.exp()
    logits = scale * text @ image.T  # [B, B]
    loss = nn.functional.cross_entropy(logits, fits / fits.sum(1, keepdim=True))
    loss = loss + nn.functional.cross_entropy(logits.T, (fits / fits.sum(0)).T)
    place = (scale * torch.einsum("be,bpe->bp", text, patches)).softmax(-1)
    named = torch.from_numpy(np.stack([patches_of(f, q.words) for f, q in zip(frames, questions, strict=True)]))
    return loss - (place * named).sum(1).clamp_min(1e-6).log().mean()


def compared(model: Any, tokenizer: Any, texts: Sequence[str], images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Questions [B, E], frames [B', E] and patches [B', P, E] in the common space, of length 1."""
    words = tokenizer(list(texts), return_tensors="pt", padding=True)
    with torch.no_grad():
        seen = model.vision_model(images)
    text = model.text_projection(model.text_model(words["input_ids"], words["attention_mask"]).pooler_output)
    found = (text, model.visual_projection(seen.pooler_output), model.visual_projection(seen.last_hidden_state[:, 1:]))
    return tuple(nn.functional.normalize(x.float(), dim=-1) for x in found)  # type: ignore[return-value]


def pixels(frames: Sequence[Scene]) -> Any:
    """Bytes [B, 96, 96, 3]."""
    return np.stack([np.asarray(f.image) for f in frames])


def patches_of(scene: Scene, words: Sequence[str]) -> Any:
    """Patches [P] that an object covers whose name holds all these words; 1 or 0."""
    grid = VIEW // PATCH
    cover = scene.masks.reshape(-1, grid, PATCH, grid, PATCH).mean((2, 4)) >= COVERED
    named = [set(words) <= {t.shape, t.colour} for t in scene.things]
    return cover[named].any(0).reshape(-1).astype(np.float32)


@torch.inference_mode()
def score_scorer(model: Any, tokenizer: Any, seed: int, clips: int) -> dict[str, float]:
    """Of held-out clips: how often the frame that fits a question best shows what it names, and its best patch too."""
    found, placed = [], []
    for n in range(clips):
        clip, questions = held_out_clip(seed, n)
        asked = [q for q in questions if q.visit is not None]
        text, image, patches = compared(
            model, tokenizer, [q.text for q in asked], normalized(pixels(clip.frames)).to(model.dtype)
        )
        best = (text @ image.T).argmax(1)
        place = torch.einsum("be,bpe->bp", text, patches[best]).argmax(1)
        for q, frame, patch in zip(asked, best.tolist(), place.tolist(), strict=True):
            found.append(q.visit is not None and q.visit.is_in(frame))
            placed.append(found[-1] and bool(patches_of(clip.frames[frame], q.words)[patch]))
    return {"frame found": float(np.mean(found)), "patch found": float(np.mean(placed))}
