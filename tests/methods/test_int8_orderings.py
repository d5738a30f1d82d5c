"""On weights that were trained, in bfloat16, on real text: what the ways of rounding activations and weights claim of each other."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from studio_state.experiment import ExperimentSpec
from studio_state.pipeline import parse_pipeline
from tests.methods.driving import attached
from workers.data.novels import held_out
from workers.families.llm import LanguageFamily
from workers.mechanisms import attention
from workers.mechanisms.calibration import gathered
from workers.mechanisms.hadamard import rotate, signs
from workers.mechanisms.linear import matrix_of
from workers.mechanisms.token_rounding import by_token
from workers.mechanisms.weight_places import places
from workers.methods import effective
from workers.models.info import model_info
from workers.models.load import load_model
from workers.models.resolve import resolve
from workers.session import Session
from workers.workloads.tokens import encode

MODEL = "austen-target"
TOKENS = 256  # of the end of the held-out text; what is calibrated on lies at its beginning


@cache
def austen() -> Any:
    return load_model(resolve(MODEL), torch.float32, attn_implementation=attention.NAME)


@pytest.fixture
def session() -> Session:
    return Session(
        spec=ExperimentSpec(model=MODEL, workload={"id": "perplexity"}, dtype="float32"),
        info=model_info(resolve(MODEL)),
        family=LanguageFamily(),
        model=austen().model,
        processor=austen().tokenizer,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@torch.inference_mode()
def scores(session: Session) -> Tensor:
    """Log-probabilities of the next token all along the text, [n, V]."""
    ids = torch.tensor([encode(session.processor, held_out())[-TOKENS:]])
    out: Tensor = session.model(ids, use_cache=False).logits[0].log_softmax(-1)
    return out


def moved(session: Session, *pipelines: str) -> list[float]:
    """Mean KL divergence from the bare model, of each."""
    bare, found = scores(session), []
    for text in pipelines:
        with attached(session, *effective(parse_pipeline(text))):
            found.append(float(F.kl_div(scores(session), bare, log_target=True, reduction="batchmean")))
    return found


@pytest.mark.slow
def test_features_with_outliers_kept_in_floats_lose_less(session: Session) -> None:
    kept, rounded, floats = moved(session, "llm-int8", "llm-int8:threshold=10000", "llm-int8:threshold=0")
    assert 0 < floats < kept < 0.6 * rounded


def test_eight_bits_on_rotated_inputs_lose_less(session: Session) -> None:
    turned, plain = moved(session, "quarot:bits=8,activation_bits=8,clip=1", "dynamic-int8")
    assert 0 < turned < 0.6 * plain


def test_finer_formats_lose_less(session: Session) -> None:
    losses = moved(session, "rtn", "fp8", "fp8:format=e5m2")
    assert losses == sorted(losses)


@torch.no_grad()
def test_what_really_goes_into_the_maps_is_rounded_to_four_bits_with_less_loss_when_rotated(session: Session) -> None:
    names, lost = places(session).linears, {}
    for _, seen in gathered(session, names, frozenset({"sample"}), 2):
        for name, one in seen.items():
            weight, x = matrix_of(session.model.get_submodule(name)).detach(), one.sample
            assert x is not None
            turn = signs(x.shape[1], 0)
            exact, errors = x @ weight.T, []
            for w, given in ((weight, x), (rotate(weight, turn), rotate(x, turn))):
                codes, step = by_token(given, bits=4)
                errors.append(float((codes * step @ w.T - exact).norm() / exact.norm()))
            lost[name] = errors
    plain, turned = (sum(e[i] for e in lost.values()) for i in (0, 1))
    assert turned < 0.8 * plain
