"""Driving a tiny model through the family, as the engine does, without workloads and events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio_state.catalog import STAGES
from studio_state.experiment import ExperimentSpec, ModelInfo
from tests import tiny
from workers.families.base import RunTrace
from workers.families.llm import LanguageFamily, State, make_batch
from workers.mechanisms import attention
from workers.methods import Policy
from workers.models.info import model_info
from workers.models.resolve import resolve
from workers.session import Session
from workers.workloads.base import Item


@cache
def load(folder: Path) -> Any:
    """The library's model of a folder, on the studio's attention function."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation(attention.NAME)
    return model


@cache
def library_model(folder: Path, attention_implementation: str) -> Any:
    """A copy of its own for oracles: asking the library for its attention maps leaves hooks in a model for good."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention_implementation).eval()


@cache
def info_of(folder: Path) -> ModelInfo:
    """What is known of a folder before its weights load."""
    return model_info(resolve(str(folder)))


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
