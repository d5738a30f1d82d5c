"""What every policy promises on models that see, and every legal pair of policies on them.

A new file under ``workers/policies`` is covered at once; ``test_contract`` does the same for language models.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from types import CellType, FunctionType, MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from studio_state.catalog import Catalog
from studio_state.experiment import ModelInfo
from studio_state.metrics import METRICS
from studio_state.pipeline import Pipeline, Step, parse_pipeline
from studio_state.problems import pipeline_problems
from tests import tiny_vision
from tests.methods.driving import attached, image_item, info_of, run_items, sample_picture, seeing_session, tokens
from tests.methods.test_contract import condition
from tests.sampling import first, sampled
from tests.tiny import SENTENCES
from workers.families.base import RunTrace
from workers.mechanisms.attention import active_forward
from workers.mechanisms.vision_attention import VisionCall, active_vision
from workers.mechanisms.weight_policy import weight_metrics
from workers.methods import Policy, catalogue, discover, effective
from workers.session import Session
from workers.workloads.base import Item

POLICIES = discover()
CATALOG: Catalog = catalogue()
BOTH = {"cls-token", "vision-blocks"}
MODELS: dict[str, tuple[str, Callable[[], Path], set[str]]] = {  # family, folder, traits that policies ask for
    "llava": ("vlm", partial(tiny_vision.llava_folder, 4), {*BOTH, "lean-shape"}),
    "llava_next": ("vlm", tiny_vision.llava_next_folder, {*BOTH, "lean-shape"}),
    "smolvlm": ("vlm", tiny_vision.smolvlm_folder, {"vision-blocks", "lean-shape"}),
    "qwen2_5_vl": ("vlm", tiny_vision.qwen2_5_vl_folder, set()),
    "vit": ("vit", tiny_vision.vit_folder, BOTH),
    "deit": ("vit", tiny_vision.deit_folder, BOTH),
    "dinov2": ("vit", tiny_vision.dinov2_folder, BOTH),
    "clip_vision": ("vit", tiny_vision.clip_vision_folder, BOTH),
}
FITTING = [
    (name, model)
    for model, (family, _, traits) in MODELS.items()
    for name, cls in POLICIES.items()
    if family in cls.card.families and set(cls.card.traits) <= traits
]
QUESTION = "The cat sat on the mat and the dog sat on the log. " * 4  # repeats itself, and fills packed groups
QUESTIONS = {  # each such that a guess of every policy that drafts is right once at least
    "llava": (SENTENCES[0] + " ") * 2,
    "qwen2_5_vl": (SENTENCES[6] + " ") * 2,
}
NEW = 20
SAME = {("tome", "smolvlm"): {"visual_tokens"}}  # a token is of several patches there: all of them still enter
FIRST = ("llava", "vit")  # every policy runs on these two each time, and on one in eight of the others
every_case = pytest.mark.parametrize(("name", "model"), sampled(FITTING, 8, always=lambda case: case[1] in FIRST))


def info(model: str) -> ModelInfo:
    return info_of(MODELS[model][1]())


def problems_of(model: str, knobs: dict[str, dict[str, Any]], **more: Any) -> list[Any]:
    steps = tuple(Step(policy=n, knobs=k) for n, k in knobs.items())
    return pipeline_problems(Pipeline(steps=steps), CATALOG, info(model), **more)


def knobs_for(name: str, model: str) -> dict[str, Any]:
    """Defaults, mended where the model is too small for them (FastV's layer)."""
    found = problems_of(model, {name: {}})
    return {p.mend.knob: p.mend.value for p in found if p.mend and p.mend.action == "set"}


def policy_for(name: str, model: str) -> Policy:
    return POLICIES[name].model_validate(knobs_for(name, model))


def session_of(model: str, **spec: Any) -> Session:
    family, folder, _ = MODELS[model]
    return seeing_session(folder(), "vqa" if family == "vlm" else "classify", **spec)


def item_for(model: str, **more: Any) -> Item:
    return image_item("generate" if MODELS[model][0] == "vlm" else "classify", QUESTIONS.get(model, QUESTION), **more)


@dataclass
class Outcome:
    """What a lane did: its output, its counts and bytes, and its distributions or features."""

    tokens: list[list[int]]
    metrics: dict[str, float]
    numbers: list[Tensor]


def run(session: Session, model: str, *policies: Policy) -> Outcome:
    """One lane, as the engine runs it."""
    with attached(session, *policies):
        trace = run_items(session, [item_for(model)], NEW)
        metrics = {**trace.counts, **weight_metrics(session)}
        metrics.pop("encode_s", None)
        return Outcome(tokens(trace), metrics, numbers(session, trace))


def numbers(session: Session, trace: RunTrace) -> list[Tensor]:
    """Distributions or features of a lane; of a language model those on its own output."""
    if trace.items[0].task == "generate":
        return list(session.family.follow(session, trace.items, trace).logits)
    return [*trace.logits, *trace.features]


@cache
def baseline(model: str) -> Outcome:
    return run(session_of(model), model)


def reachable(root: nn.Module) -> int:
    """Bytes of all tensors that a model keeps alive: in its modules, their attributes, hooks and what those close over."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    waiting: list[Any] = [root]
    while waiting:
        x = waiting.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            if not x.is_meta:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            waiting += [*x.keys(), *x.values()]
        elif isinstance(x, list | tuple | set | frozenset):
            waiting += x
        elif isinstance(x, nn.Module):
            waiting.append(vars(x))
        elif isinstance(x, FunctionType):
            waiting += [x.__closure__, x.__defaults__, x.__kwdefaults__]
        elif isinstance(x, MethodType):
            waiting += [x.__self__, x.__func__]
        elif isinstance(x, CellType):
            waiting += gc.get_referents(x)
        elif isinstance(x, partial):
            waiting += [x.func, x.args, x.keywords]
        elif type(x).__module__.startswith("workers."):
            waiting += gc.get_referents(x)
    return sum(storages.values())


# -- cards ---------------------------------------------------------------------------------
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_card_lets_in_what_fits_and_nothing_else(name: str, model: str) -> None:
    card, (family, _, traits) = CATALOG.by_id[name], MODELS[model]
    messages = [p.message for p in problems_of(model, {name: knobs_for(name, model)})]
    assert info(model).family == family
    if (name, model) in FITTING:
        assert messages == []
    elif family not in card.families:
        assert len(messages) == 1
        assert f"family {family}" in messages[0]
    else:
        assert len(messages) == len(set(card.traits) - traits)
        assert all("needs a model with the trait" in m for m in messages)


def test_every_policy_for_models_that_see_is_run_here() -> None:
    for name, cls in POLICIES.items():
        for family in {"vlm", "vit"} & set(cls.card.families):
            assert any(n == name and MODELS[m][0] == family for n, m in FITTING), name


# -- runs ----------------------------------------------------------------------------------
@every_case
def test_effects_hold_at_default_knobs(name: str, model: str) -> None:
    session, card, before = session_of(model), CATALOG.by_id[name], baseline(model).metrics
    after = run(session, model, policy_for(name, model)).metrics
    assert session.acted.get(name, 0) > 0, "nothing was done"
    exist = {*before, *after}
    for metric, direction in card.effects.items():
        if metric not in exist:  # an encoder has no cache
            assert MODELS[model][0] == "vit"
            continue
        was, now = before.get(metric, 0.0), after[metric]
        wanted = "same" if metric in SAME.get((name, model), ()) else direction
        assert {"up": now > was, "down": now < was, "same": now == was}[wanted], f"{metric}: {was} -> {now}"
    assert set(after) <= set(METRICS)


@every_case
def test_neutral_knobs_change_nothing(name: str, model: str) -> None:
    card = CATALOG.by_id[name]
    if card.neutral is None:
        assert card.not_neutral_because
        return
    got, expected = run(session_of(model), model, POLICIES[name].model_validate(card.neutral)), baseline(model)
    assert got.tokens == expected.tokens
    if card.neutral:  # without a knob that makes it do nothing it acts, and the output stays
        assert {k: v for k, v in got.metrics.items() if k in expected.metrics} == expected.metrics
    for a, b in zip(got.numbers, expected.numbers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def in_a_layer(session: Session, layer: int) -> Any:
    """Stop in the middle of a layer of the encoder."""

    def stop(call: VisionCall) -> None:
        if call.layer == layer:
            raise KeyboardInterrupt

    return session.hooked(session.vision_observers, stop)


def behind_the_prefill(session: Session) -> Any:
    """Stop before the first decode step."""

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    return session.hooked(session.before_decode, stop)


def interrupted(session: Session, model: str, policy: Policy, stopping: Callable[[Session], Any]) -> None:
    with attached(session, policy), stopping(session):
        run_items(session, [item_for(model)], 2)


@every_case
def test_everything_is_undone(name: str, model: str) -> None:
    expected, session, policy = baseline(model), session_of(model), policy_for(name, model)
    before, held = condition(session), reachable(session.model)
    run(session, model, policy)
    session.built.clear()
    assert condition(session) == before
    assert reachable(session.model) == held
    for stopping in (
        (partial(in_a_layer, layer=1), behind_the_prefill) if MODELS[model][0] == "vlm" else (partial(in_a_layer, layer=0),)
    ):
        with pytest.raises(KeyboardInterrupt):
            interrupted(session, model, policy, stopping)
        session.built.clear()
        assert condition(session) == before
        assert reachable(session.model) == held
        assert active_vision() is None
        assert active_forward() is None
    again = run(session, model)
    assert again.tokens == expected.tokens
    assert again.metrics == expected.metrics
    assert all(torch.equal(a, b) for a, b in zip(again.numbers, expected.numbers, strict=True))


def live_tensors() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and not x.is_meta]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


@pytest.mark.parametrize("model", first(1, "vit", "llava"))
def test_no_tensor_stays_behind_anywhere(model: str) -> None:
    """Not in the model, not in a policy, a closure or a cache of the library: a second run holds what the first did.

    The first fills tables of constants (bits of a byte, Hadamard matrices), which stay.
    """
    for _ in range(2):
        before = live_tensors()
        for name in (n for n, m in FITTING if m == model):
            run(session_of(model), model, policy_for(name, model))
    assert live_tensors() == before


# -- batches and chunks --------------------------------------------------------------------
@pytest.mark.parametrize("name", [n for n, m in FITTING if m == "llava"])
def test_chunked_prefill_runs_or_is_refused(name: str) -> None:
    whole = any(u.resource == "prefill.whole" and u.mode == "needs" for u in CATALOG.by_id[name].uses({}))
    assert len(problems_of("llava", {name: {}}, chunked=True)) == whole
    if not whole:
        session = session_of("llava", chunk_size=16)
        with attached(session, POLICIES[name]()):
            trace = run_items(session, [item_for("llava")], NEW)
        assert len(tokens(trace)[0]) == NEW
        assert session.acted[name] > 0


@pytest.mark.parametrize(("name", "model"), [(n, m) for n, m in FITTING if m in ("llava", "vit")])
def test_batches_run_or_are_refused(name: str, model: str) -> None:
    limit = CATALOG.by_id[name].max_batch
    assert len(problems_of(model, {name: {}}, batch=2)) == (limit == 1)
    if limit is None:
        session = session_of(model)
        items = [item_for(model, id="a"), item_for(model, id="b", picture=sample_picture(seed=3))]
        with attached(session, POLICIES[name]()):
            trace = run_items(session, items, 4)
        assert len(trace.seen) == 2
        assert session.acted[name] > 0
        if model == "llava":
            assert [len(row) for row in tokens(trace)] == [4, 4]


@pytest.mark.parametrize("name", [n for n, m in FITTING if m == "llava"])
def test_words_without_an_image_run_too(name: str) -> None:
    session = session_of("llava")
    with attached(session, POLICIES[name]()):
        trace = run_items(session, [Item(id="words", prompt=QUESTION, ignore_eos=True)], 4)
    assert len(tokens(trace)[0]) == 4


# -- pairs ---------------------------------------------------------------------------------
def legal_pairs(model: str) -> Iterator[str]:
    names = [n for n, m in FITTING if m == model]
    return (f"{a}+{b}" for a, b in combinations(names, 2) if not problems_of(model, {a: {}, b: {}}))


@pytest.mark.parametrize(
    ("text", "model"), sampled(((text, model) for model in ("llava", "vit", "clip_vision") for text in legal_pairs(model)), 32)
)
def test_every_legal_pair_runs_and_both_act(text: str, model: str) -> None:
    policies = [POLICIES[name]() for name in text.split("+")]
    session, expected = session_of(model), baseline(model)
    got = run(session, model, *policies)
    if model == "llava":
        assert len(got.tokens[0]) == NEW
    assert all(bool(torch.isfinite(x).all()) for x in got.numbers)
    for policy in policies:
        if policy.card.id != "prompt-lookup":  # it guesses only where the text repeats itself
            assert session.acted.get(policy.card.id, 0) > 0, policy.card.id
    again = run(session, model)
    assert again.metrics == expected.metrics
    assert all(torch.equal(a, b) for a, b in zip(again.numbers, expected.numbers, strict=True))


@pytest.mark.parametrize("model", ["llava", "llava_next", "smolvlm"])
@pytest.mark.parametrize(
    "text",
    [
        "tome:keep=0.5",
        "divprune:keep=0.5+snapkv:keep=0.4",
        "fastv:keep=0.5,layer=1+kivi:bits=8,group_size=8,residual=8",
        "random-visual:keep=0.3+layer-skip:start=0+h2o:keep=0.4",
    ],
)
def test_lean_decode_changes_no_stack(text: str, model: str) -> None:
    """The same tokens, distributions and counts with and without it."""
    found = []
    for whole in (text, f"{text}+lean-decode"):
        found.append(run(session_of(model), model, *effective(parse_pipeline(whole))))
    assert found[0].tokens == found[1].tokens
    assert found[0].metrics == found[1].metrics
    torch.testing.assert_close(found[1].numbers, found[0].numbers, rtol=1e-5, atol=2e-5)


def test_there_are_as_many_pairs_as_expected() -> None:
    """Two choosers of image tokens, of prompt tokens, of cache positions or of number formats are never a pair."""
    pairs = set(legal_pairs("llava"))
    assert len(pairs) > 90
    choosers = [n for n in POLICIES if any(u.resource == "tokens.visual" for u in CATALOG.by_id[n].resources)]
    assert len(choosers) >= 6
    for a, b in combinations(sorted(POLICIES), 2):
        if a in choosers and b in choosers:
            assert not {f"{a}+{b}", f"{b}+{a}"} & pairs
    assert set(legal_pairs("vit")) >= {"tome+rtn", "rtn+tome"} & {f"{a}+{b}" for a, b in combinations(POLICIES, 2)}
