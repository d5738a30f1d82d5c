"""Driving a tiny model through the family, as the engine does, without workloads and events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio_state.catalog import STAGES, Card
from studio_state.experiment import ExperimentSpec, ModelInfo
from tests import tiny
from workers.data.pictures import side_by_side
from workers.families.base import RunTrace
from workers.families.batches import State, make_batch
from workers.families.llm import LanguageFamily
from workers.mechanisms import attention
from workers.methods import Policy
from workers.models.alignment import align
from workers.models.info import model_info
from workers.models.resolve import resolve
from workers.session import Session
from workers.workloads.base import Item

OPTIONS: dict[str, dict[str, Any]] = {  # some photographs are left to calibrate on, and no tiny model knows the names of clothes
    "classify": {"source": "photos", "items": 2}
}


@cache
def load(folder: Path) -> Any:
    """The library's model of a folder, on the studio's attention function."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation(attention.NAME)
    align(model)
    return model


@cache
def library_model(folder: Path, attention_implementation: str) -> Any:
    """A copy of its own for oracles: asking the library for its attention maps leaves hooks in a model for good."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention_implementation).eval()
    align(model)
    return model


@cache
def info_of(folder: Path) -> ModelInfo:
    """What is known of a folder before its weights load."""
    return model_info(resolve(str(folder)))


def folder_for(*cards: Card) -> Path:
    """The tiny model with the traits that these cards ask for: a mixture of experts, or the Llama."""
    return tiny.moe_folder() if any("moe" in c.traits for c in cards) else tiny.llama_folder()


def make_session(folder: Path | None = None, **spec: Any) -> Session:
    """A session on a tiny model (by default the Llama), with fields of the experiment set."""
    folder = folder or tiny.llama_folder()
    return Session(
        spec=ExperimentSpec(model="tiny", workload={"id": "speed"}, dtype="float32", **spec),
        info=info_of(folder),
        family=LanguageFamily(),
        model=load(folder),
        processor=tiny.tokenizer(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids that are no special tokens."""
    return torch.randint(3, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def repetitive_prompt(length: int, period: int = 16, seed: int = 0) -> list[int]:
    """A random phrase, over and over."""
    phrase = prompt(period, seed)
    return (phrase * (length // period + 1))[:length]


def generate(session: Session, prompts: Sequence[Sequence[int]], new: int = 16) -> RunTrace:
    """Run a batch of prompts to exactly ``new`` tokens each."""
    items = [Item(id=str(i), prompt_ids=tuple(p), max_new_tokens=new, ignore_eos=True) for i, p in enumerate(prompts)]
    trace = session.family.begin(session, items)
    for _ in session.family.run(session, trace):
        pass
    return trace


@contextmanager
def attached(session: Session, *policies: Policy) -> Iterator[None]:
    """Policies on the session in their order, each prepared while those before it are attached."""
    with ExitStack() as stack:
        for policy in sorted(policies, key=lambda p: STAGES.index(p.card.stage or "runtime")):
            policy.prepare(session)
            stack.enter_context(policy.attach(session))
        yield


@torch.inference_mode()
def prefill(session: Session, *prompts: Sequence[int]) -> State:
    """Only the prefill, with whatever policies do at its end."""
    return session.family.prefill(session, make_batch(prompts, 0, session.device))


@torch.inference_mode()
def forced(session: Session, ids: Sequence[int], following: Sequence[int]) -> Tensor:
    """Log-probabilities before each of the following tokens, by the decode path: [n, V]."""
    return session.family.force(session, prefill(session, ids), list(following))


def tokens(trace: RunTrace) -> list[list[int]]:
    """Token ids of every row."""
    return [r.token_ids for r in trace.results]


@cache
def load_seeing(folder: Path) -> Any:
    """Model, tokenizer and image processor of a folder of ``tests.tiny_vision``, loaded as the studio loads them."""
    from workers.models.load import load_model

    return load_model(resolve(str(folder)), torch.float32, attn_implementation=attention.NAME)


def seeing_session(folder: Path, workload: str = "vqa", **spec: Any) -> Session:
    """A session on a tiny model that sees."""
    from workers.host import FAMILIES

    loaded, info = load_seeing(folder), info_of(folder)
    return Session(
        spec=ExperimentSpec(
            model="tiny", workload={"id": workload, "options": OPTIONS.get(workload, {})}, dtype="float32", **spec
        ),
        info=info,
        family=FAMILIES[info.family](),
        model=loaded.model,
        processor=loaded.tokenizer,
        images=loaded.images,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@cache
def sample_picture(width: int = 128, height: int = 128, seed: int = 0) -> Any:
    """A picture with something in it: soft noise in colour, so that no two patches are alike."""
    import numpy as np

    from workers.data.pictures import ArrayPicture

    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return ArrayPicture(np.kron(small, np.ones((8, 8, 1), dtype=np.uint8)))


@dataclass(frozen=True)
class SampleClip:
    """Some frames, each a picture of its own."""

    pictures: tuple[Any, ...]

    def frames(self) -> list[Any]:
        """The frames."""
        return [p.open() for p in self.pictures]

    def open(self) -> Any:
        """All of them in one picture."""
        return side_by_side(self.frames())


def clip_item(frames: int = 4, width: int = 64, height: int = 64, **more: Any) -> Item:
    """One item with a clip."""
    pictures = tuple(sample_picture(width, height, seed) for seed in range(frames))
    return image_item(picture=SampleClip(pictures), **more)


def image_item(task: str = "generate", prompt: str = "What is in the picture?", picture: Any = None, **more: Any) -> Item:
    """One item with an image."""
    more.setdefault("id", "one")
    return Item(prompt=prompt, task=task, image=picture or sample_picture(), ignore_eos=True, **more)  # type: ignore[arg-type]


def run_items(session: Session, items: Sequence[Item], new: int = 8) -> RunTrace:
    """One batch through the family, as the engine runs it."""
    with session.having(spec=session.spec.model_copy(update={"max_new_tokens": new})):
        trace = session.family.begin(session, items)
        for _ in session.family.run(session, trace):
            pass
    return trace
