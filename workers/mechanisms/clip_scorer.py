"""The text half of a CLIP model beside a model that sees with its vision tower: what in a picture fits a question?

Radford et al. 2021, CLIP, arXiv:2103.00020. The tower itself is not loaded again: what it made of a picture, when the
model looked at it, is carried into the common space by CLIP's projection.

Shapes: E width of the common space, D width of the vision tower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from studio_state.errors import SpecError
from workers.families.parts import TOWERS, child
from workers.models.resolve import resolve
from workers.models.talk import quiet_library
from workers.session import Session

SCORER = "scorer"  # folder of a CLIP model beside the weights of a model that sees
SAME = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")  # of two towers


class Scorer(nn.Module):
    """A CLIP model without its vision tower."""

    def __init__(self, clip: Any, tokenizer: Any):
        super().__init__()
        self.text_model, self.text_projection, self.visual_projection = (
            clip.text_model,
            clip.text_projection,
            clip.visual_projection,
        )
        self.tokenizer, self.longest = tokenizer, clip.config.text_config.max_position_embeddings

    def text(self, words: str) -> Tensor:
        """A text in the common space: [E], of length 1."""
        found = self.tokenizer(words, return_tensors="pt", truncation=True, max_length=self.longest)
        ids, mask = (found[name].to(self.text_projection.weight.device) for name in ("input_ids", "attention_mask"))
        return F.normalize(self.text_projection(self.text_model(ids, mask).pooler_output)[0].float(), dim=-1)

    def seen(self, features: Tensor) -> Tensor:
        """What the vision tower made of something, in the common space: [..., D] -> [..., E]."""
        projected: Tensor = self.visual_projection(features).float()
        return projected


def load_scorer(session: Session, name: str) -> Scorer:
    """The scorer that comes with the model, or another one, in the session's number format.

    Args:
        name: zoo id, Hub id or folder of a CLIP model; empty = the folder ``scorer`` beside the model's weights.

    Raises:
        ModelError: it cannot be found.
        SpecError: there is none, it is no CLIP model, or one of another vision tower than the model's.
    """
    from transformers import AutoTokenizer, CLIPModel

    folder = Path(session.model.name_or_path) / SCORER
    if not name and not folder.is_dir():
        raise SpecError(
            f"{session.info.name} comes with no scorer that compares a question with a picture; set scorer to a CLIP model "
            "with the vision tower of this model, or choose scene-vlm-clips"
        )
    found = resolve(name or str(folder), progress=lambda phase, done, text: session.say(text or phase, done))
    if found.config is None or found.config.model_type != "clip":
        raise SpecError(f"scorer {name!r} is no CLIP model; give one with the vision tower of {session.info.name}")
    tower: Any = child(session.model.model, TOWERS)
    for field in SAME:
        mine, theirs = getattr(tower.config, field, None), getattr(found.config.vision_config, field)
        if mine != theirs:
            raise SpecError(
                f"scorer {name!r} has another vision tower than {session.info.name} ({field} {theirs}, not {mine}); "
                "give the CLIP model that this tower comes from"
            )
    with quiet_library():
        clip = CLIPModel.from_pretrained(found.path, dtype=session.dtype)
        words = AutoTokenizer.from_pretrained(found.path)
    return Scorer(clip, words).to(session.device).requires_grad_(False).eval()
