"""The bench of weight quality: its SQNR by hand, its rows on tiny models, its text that nothing was calibrated on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from studio_state.errors import ModelError
from tests import tiny
from tests.methods.driving import attached, make_session
from workers.bench import weight_quality
from workers.bench.plan import Plan
from workers.bench.weight_quality import METHODS, Case, bench, cases, measured, sqnr, told, unread_text
from workers.data.novels import held_out
from workers.host import ModelHost
from workers.mechanisms.calibration import TEXT_TOKENS
from workers.mechanisms.linear import matrix_of
from workers.mechanisms.weight_policy import targets
from workers.models.info import model_info
from workers.models.load import load_inputs
from workers.models.resolve import resolve
from workers.policies.quantize.gptq import GPTQ
from workers.policies.quantize.rtn import RoundToNearest
from workers.workloads.tokens import encode

PLAN = Plan("", 1)
WINDOWS = {"context": 24, "score": 8}


def case_of(folder: Path) -> Case:
    return Case(str(folder), "perplexity", 2, "perplexity", options=WINDOWS)


def test_sqnr_by_hand() -> None:
    fine = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.5]])  # 25 over 0.25
    lost = torch.tensor([[1.0]]), torch.tensor([[0.0]])  # 1 over 1
    assert sqnr([fine]) == pytest.approx(20)
    assert sqnr([lost]) == 0
    assert sqnr([fine, lost]) == pytest.approx(10 * math.log10(26 / 1.25))  # over all together, no mean of decibels
    assert sqnr([(fine[0], fine[0])]) == math.inf
    with pytest.raises(ValueError, match="not all zero"):
        sqnr([(torch.zeros(1, 2), fine[1])])


def test_rows_of_a_tiny_model(capsys: pytest.CaptureFixture[str]) -> None:
    case = case_of(tiny.llama_folder())
    rows = list(told(case, measured(case, case.spec(PLAN), ModelHost(), (4,))))
    base, rtn, *others = rows
    assert [(r.method, r.bits) for r in rows] == [("baseline", 0), *((m, 4) for m in METHODS)]
    assert base.values["kl_to_baseline"] == 0
    assert "sqnr_db" not in base.values
    assert all(r.values["replaced_modules"] == 15 for r in rows[1:])  # 2 layers of 7 maps, and the head
    assert all(r.values["kl_to_baseline"] > 0 and not r.message for r in rows[1:])
    assert all(r.task.value == pytest.approx(r.values["perplexity"] / base.values["perplexity"]) for r in rows[1:] if r.task)
    assert rtn.against_first is None
    for row in others:
        assert row.against_first is not None
        assert row.against_first.value == pytest.approx(row.values["kl_to_baseline"] - rtn.values["kl_to_baseline"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1

    session = make_session()
    names = targets(session, RoundToNearest())
    before = {n: session.model.get_submodule(n) for n in names}
    with attached(session, RoundToNearest(bits=4)):
        own = sqnr((matrix_of(before[n]).detach(), matrix_of(session.model.get_submodule(n))) for n in names)
    assert rtn.values["sqnr_db"] == pytest.approx(own)


def test_experts_are_counted_and_lanes_that_do_not_fit_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_quality, "METHODS", ("rtn", "hqq"))
    case = case_of(tiny.moe_folder())  # experts of width 48, which no group divides
    _, rtn, hqq, *three = measured(case, case.spec(PLAN), ModelHost(), (8, 3))
    assert rtn.values["replaced_modules"] == 2 * (4 + 2 * 8) + 1  # 2 layers of 4 maps and 8 experts of 2, and the head
    assert rtn.values["sqnr_db"] > 30
    assert hqq.values == rtn.values  # with 8 bits it is rtn
    assert [(r.method, r.bits) for r in three] == [("rtn", 3), ("hqq", 3)]
    assert all("group_size = 32 does not divide" in r.message and not r.values for r in three)


def test_nothing_is_calibrated_on_the_text_that_is_measured() -> None:
    """The longest tokens are those of the model trained on these novels."""
    tokenizer = load_inputs(resolve("austen-target"), "llm")[0]
    seen = tokenizer.decode(encode(tokenizer, held_out())[: GPTQ().samples * TEXT_TOKENS])
    assert held_out().startswith(seen)
    assert len(seen) + len(unread_text()) < len(held_out())


def test_cases_are_of_every_family_and_ship() -> None:
    whole, quick = cases(PLAN, ""), cases(PLAN.quick(), "")
    assert {c.model for c in quick} < {c.model for c in whole}
    assert whole[-1].model == PLAN.model
    assert all(resolve(c.model).path.is_dir() for c in whole[:-1])
    assert [model_info(resolve(c.model)).family for c in quick] == ["llm", "vlm", "vit", "diffusion"]
    assert all(c.items == 2 for c in quick)


def test_a_model_that_is_not_there_is_told_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="no file or folder '/no/such'"):
        bench(Plan("/no/such", 1))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_smoke_run(capsys: pytest.CaptureFixture[str]) -> None:
    plan = PLAN.quick()
    bench(plan)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["model"] for line in lines] == [c.model for c in cases(plan, "") for _ in range(1 + len(METHODS))]
    assert all("message" not in line for line in lines)
    assert all(line["sqnr_db"] > 10 for line in lines if line["bits"])
