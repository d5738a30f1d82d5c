"""On weights that were trained, in bfloat16, on real text: methods that look at inputs lose less than rounding to the nearest."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from studio_state.experiment import ExperimentSpec
from tests.methods.driving import attached
from workers.data.novels import held_out
from workers.families.llm import LanguageFamily
from workers.mechanisms import attention
from workers.mechanisms.calibration import gathered
from workers.mechanisms.linear import matrix_of
from workers.mechanisms.output_error import output_error
from workers.mechanisms.rounding import GroupedPolicy
from workers.mechanisms.weight_policy import targets
from workers.models.info import model_info
from workers.models.load import load_model
from workers.models.resolve import resolve
from workers.policies.quantize.awq import AWQ
from workers.policies.quantize.gptq import GPTQ
from workers.policies.quantize.mixed_bits import MixedBits
from workers.policies.quantize.rtn import RoundToNearest
from workers.session import Session
from workers.workloads.tokens import encode

MODEL = "austen-target"
TWO_LAYERS = "*.layers.0.*,*.layers.3.*"
WINDOWS, LENGTH = 8, 512  # of the end of the held-out text; what is calibrated on lies at its beginning


@pytest.fixture
def session() -> Session:
    resolved, loaded = resolve(MODEL), austen()
    return Session(
        spec=ExperimentSpec(model=MODEL, workload={"id": "perplexity"}, dtype="float32"),
        info=model_info(resolved),
        family=LanguageFamily(),
        model=loaded.model,
        processor=loaded.tokenizer,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@cache
def austen() -> Any:
    return load_model(resolve(MODEL), torch.float32, attn_implementation=attention.NAME)


def errors(session: Session, policy: GroupedPolicy) -> tuple[dict[str, float], dict[str, str]]:
    """Share of each map's output that is lost, and which maps have the same input."""
    names = targets(session, policy)
    stats = {n: s for _, group in gathered(session, names, frozenset({"moment"}), 8) for n, s in group.items()}
    moments: dict[str, Tensor] = {n: s.moment for n, s in stats.items()}  # type: ignore[misc]
    before = {n: matrix_of(session.model.get_submodule(n)).detach().float() for n in names}
    with attached(session, policy):
        after = {n: matrix_of(session.model.get_submodule(n)) for n in names}
    lost = {n: float(output_error(after[n] - before[n], moments[n]).sum()) for n in names}
    whole = {n: float(output_error(before[n], moments[n]).sum()) for n in names}
    return {n: lost[n] / whole[n] for n in names}, {n: stats[n].beside for n in names}


@torch.inference_mode()
def perplexity(session: Session) -> float:
    """Of the last windows of the held-out text, each by one forward of the library."""
    ids, losses = encode(session.processor, held_out())[-WINDOWS * LENGTH :], []
    for start in range(0, len(ids), LENGTH):
        rows = torch.tensor([ids[start : start + LENGTH]])
        scores = session.model(rows, use_cache=False).logits[0, :-1].log_softmax(-1)
        losses.append(-float(scores.gather(1, rows[0, 1:, None]).mean()))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("bits", [4, 3])
def test_outputs_move_less_than_by_rounding(session: Session, bits: int) -> None:
    rounding, beside = errors(session, RoundToNearest(bits=bits, modules=TWO_LAYERS))
    fed_back, _ = errors(session, GPTQ(bits=bits, modules=TWO_LAYERS))
    scaled, _ = errors(session, AWQ(bits=bits, modules=TWO_LAYERS))
    mixed, _ = errors(session, MixedBits(bits=bits, modules=TWO_LAYERS))
    assert len(rounding) == 14
    assert all(fed_back[n] < rounding[n] for n in rounding)
    assert sum(scaled.values()) < sum(rounding.values())
    assert all(scaled[n] < rounding[n] for n in rounding if list(beside.values()).count(beside[n]) == 1)
    assert sum(mixed.values()) <= sum(rounding.values())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 3])
def test_held_out_text_stays_likelier_than_by_rounding(session: Session, bits: int) -> None:
    found = {}
    for policy in (RoundToNearest(bits=bits, head="keep"), GPTQ(bits=bits, head="keep"), AWQ(bits=bits, head="keep")):
        with attached(session, policy):
            found[policy.card.id] = perplexity(session)
    plain = perplexity(session)
    assert plain < found["gptq"] < found["rtn"]
    assert plain < found["awq"] < found["rtn"]
