"""Who drafts: a smaller model with a cache of its own, or the model's own first layers on the model's own cache.

Both guess one token a forward and leave no trace of what the model then refuses. Where tokens are drawn, the
draft draws with the very random numbers that the model is going to draw with (Gumbel sampling of Daliri et al.
2024, arXiv:2408.07978): guesses are right more often, and the output does not depend on who drafts.

Shapes: B batch (1 here), V width of the logits of the model that is drafted for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio_state.errors import SpecError, Unavailable
from studio_state.experiment import ModelInfo
from workers.families.batches import State, make_batch
from workers.families.llm import Generation, LanguageFamily
from workers.mechanisms.attention import NAME as ATTENTION
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.speculation import take_back
from workers.models.info import model_info
from workers.models.load import load_model, load_tokenizer
from workers.models.resolve import resolve
from workers.session import Session

_SHOWN_TOKENS = 3  # of those that two vocabularies do not share


@dataclass(frozen=True)
class DraftModel:
    """A small model that can stand beside the one it drafts for.

    Attributes:
        known: ids that it can read; the others (placeholders of an image, say) are left out of its text.
    """

    model: Any
    info: ModelInfo
    known: frozenset[int]


def load_draft(session: Session, name: str) -> DraftModel:
    """Load a draft model in the session's number format, onto its device. Code that it brings along never runs.

    Args:
        name: zoo id, Hub id or folder.

    Raises:
        ModelError: it cannot be found or loaded.
        SpecError: it is no language model, cannot take tokens back, or has another vocabulary.
    """
    resolved = resolve(name, progress=lambda phase, done, text: session.say(text or phase, done))
    info = model_info(resolved)
    if info.family != "llm":
        raise SpecError(f"draft_model {name!r} is of family {info.family}; give a language model, or none")
    if "ssm" in info.traits:
        raise SpecError(
            f"draft_model {name!r} has state-space layers (trait 'ssm'), whose running state cannot be taken back to before a "
            "refused guess; give a model with attention layers only"
        )
    known = shared_ids(session.processor, load_tokenizer(resolved), session.info.name, name)
    model = load_model(resolved, session.dtype, str(session.device), ATTENTION).model
    rows = model.get_input_embeddings().num_embeddings
    unread = {getattr(session.model.config, "image_token_id", None)}
    return DraftModel(model, info, frozenset(i for i in known - unread if i < rows))


def shared_ids(tokenizer: Any, draft: Any, name: str, draft_name: str) -> frozenset[int]:
    """Ids that mean the same to both tokenizers: all of the draft's.

    Tokens that were added to the model's own vocabulary later (for images, for example) may be unknown to the draft.

    Raises:
        SpecError: another token differs.
    """
    mine, theirs = tokenizer.get_vocab(), draft.get_vocab()
    added = set(tokenizer.get_added_vocab())
    other = [t for t, i in theirs.items() if mine.get(t) != i]
    other += [t for t in mine.keys() - theirs.keys() if t not in added]
    if other:
        first = ", ".join(map(repr, sorted(other)[:_SHOWN_TOKENS]))
        raise SpecError(
            f"draft_model {draft_name!r} has another vocabulary than {name}: {len(theirs)} tokens against {len(mine)}, {len(other)} "
            f"of them differ (first: {first}); give a smaller model of the same family, or none"
        )
    return frozenset(theirs.values())


def guess(
    family: LanguageFamily, session: Session, state: State, ids: list[int], count: int, like: Generation, least: float
) -> list[int]:
    """Up to ``count`` tokens after the next ones ``ids``, one forward each; fewer where the draft is unsure.

    Args:
        family, session, state: of the draft.
        like: what is drafted for: whose random numbers and vocabulary the draft uses.
        least: stop where the likeliest token has a smaller probability; 0 = never.
    """
    sampler, width = like.sampler.twin(), like.state.logits.shape[-1]
    found: list[int] = []
    while len(found) < count:
        logits = family.step(session, state, torch.tensor([ids], device=session.device))[:, -1]
        if least > 0 and float(logits.float().softmax(-1).max()) < least:
            break
        ids = sampler.draw(as_wide(logits, width)).tolist()
        found += ids
    return found


def as_wide(logits: Tensor, width: int) -> Tensor:
    """Logits [B, V'] as [B, V]: vocabularies of one tokenizer may be padded to different widths."""
    return F.pad(logits[:, :width], (0, max(0, width - logits.shape[-1])), value=float("-inf"))


class SmallModel:
    """Drafts of another model, with a cache of its own. Its bytes count as the lane's.

    Args:
        count: tokens guessed at once.
        min_confidence: see :func:`guess`.

    Attributes:
        read: the tokens that its cache holds.
    """

    def __init__(self, session: Session, run: Generation, draft: DraftModel, count: int, min_confidence: float):
        self.session, self.run, self.draft = session, run, draft
        self.count, self.min_confidence = count, min_confidence
        self.family = LanguageFamily()
        self.beside = Session(
            spec=session.spec,
            info=draft.info,
            family=self.family,
            model=draft.model,
            processor=session.processor,
            device=session.device,
            dtype=session.dtype,
            is_cancelled=session.is_cancelled,
        )
        self.state: State | None = None
        self.read: list[int] = []
        self.counted = 0

    def __call__(self, history: Sequence[int], most: int) -> list[int]:
        """Tokens that may come next. What was refused since the last call is taken back first."""
        text = [t for t in history if t in self.draft.known]
        room = self.draft.info.context - len(text) + 1 if self.draft.info.context else most
        count = min(self.count, most, room)
        if count < 1 or len(text) < 2:
            return []
        state = self.state or self._prefill(text[:-1])
        agreed = min(common(self.read, text), len(text) - 1)
        take_back(state, len(self.read) - agreed)
        found = guess(self.family, self.beside, state, text[agreed:], count, self.run, self.min_confidence)
        self.read = (text + found)[: state.cache.seen]  # the newest guess is not read
        bytes_now = state.cache.nbytes()
        self.session.count("kv_bytes", bytes_now - self.counted)
        self.counted = bytes_now
        return found

    def _prefill(self, ids: list[int]) -> State:
        self.read = ids
        self.state = self.family.prefill(self.beside, make_batch([ids], 0, self.beside.device))
        return self.state


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class FirstLayers:
    """Drafts of the model's own first layers, its final norm and its output head: no weights and no cache besides the model's.

    The keys and values that these layers keep of the text are those that they compute as a draft, so the draft reads
    the model's cache, appends to it, and takes its own entries back before they are checked.

    Args:
        layers: how many of the first layers.
        count: tokens guessed at once.
        min_confidence: see :func:`guess`.
    """

    def __init__(self, session: Session, run: Generation, layers: int, count: int, min_confidence: float):
        self.session, self.run, self.count, self.min_confidence = session, run, count, min_confidence
        self.place, whole = layer_list(session)
        self.layers = whole[:layers]
        self.cache = StudioCache(0)
        self.cache.layers = run.state.cache.layers[:layers]

    def __call__(self, history: Sequence[int], most: int) -> list[int]:
        """Tokens that may come next."""
        before, state = self.cache.seen, replace(self.run.state, cache=self.cache)
        with self.shortened():
            found = guess(
                self.run.family, self.session, state, [history[-1]], min(self.count, most), self.run, self.min_confidence
            )
        self.cache.crop_newest(self.cache.seen - before)
        return found

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """The model without its later layers; what is counted and seen of its forwards is not the lane's."""
        with (
            self.session.swapped({self.place: self.layers}),
            self.session.having(step_forward=None, observers=[], after_step=[], counts={}),
        ):
            yield


def layer_list(session: Session) -> tuple[str, nn.ModuleList]:
    """Name and contents of the list of the language model's layers.

    Raises:
        Unavailable: the model does not keep its layers in one list.
    """
    base = session.family.backbone(session.model)
    found = (m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == session.info.layers)
    layers = next(found, None)
    name = next((n for n, m in session.model.named_modules() if m is layers), None)
    if layers is None or name is None:
        raise Unavailable(
            f"{session.info.name} does not keep its layers in one list, so the first of them cannot run alone; "
            "give a draft_model where a policy takes one, or remove the policy"
        )
    return name, layers
