"""Where weight bytes go: bits, scales and padding against what is held, for every policy that replaces weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from torch import Tensor, nn

from studio_state.catalog import Card
from studio_state.events import LaneFinished, Metric
from studio_state.pipeline import Pipeline
from tests import tiny, tiny_vision
from tests.methods.drawing import opened
from tests.methods.driving import attached, make_session, prompt, seeing_session
from tests.tiny_diffusion import stirred
from workers.families.class_pipeline import ClassConditionalPipeline
from workers.lanes import Lane
from workers.mechanisms.linear import DenseLinear, Replacement, held_bytes
from workers.mechanisms.weight_ledger import outermost, weight_ledger
from workers.mechanisms.weight_policy import Spot, WeightPolicy, ledger, weight_metrics
from workers.methods import card, discover
from workers.plan import needs
from workers.policies.quantize.dynamic_int8 import DynamicInt8
from workers.policies.quantize.rtn import RoundToNearest
from workers.race import Race
from workers.session import Session
from workers.workloads.base import Item
from workers.workloads.registry import make_workload

FLOAT = 4
WEIGHT_POLICIES = {n: cls for n, cls in discover().items() if cls.card.changes_weights}
SESSIONS: dict[str, Callable[[Path], Session]] = {
    "llm": lambda home: make_session(),
    "moe": lambda home: make_session(tiny.moe_folder(intermediate_size=64)),
    "vit": lambda home: seeing_session(tiny_vision.vit_folder(), "classify"),
    "unet": lambda home: opened(wide_unet(home)),
}
QUICK = {"samples": 1, "steps": 1, "tokens": 64}  # knobs of calibrated policies that cost time and change no byte


def wide_unet(home: Path) -> Path:
    """A pipeline like the tests' own, whose widths a group of 32 divides."""
    folder = home / "wide-unet"
    if not (folder / "model_index.json").is_file():
        net = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 32), down_block_types=("AttnDownBlock2D",) * 2,
            up_block_types=("AttnUpBlock2D",) * 2, layers_per_block=1, norm_num_groups=8, attention_head_dim=16, num_class_embeds=4,
        )  # fmt: skip
        pipeline = ClassConditionalPipeline(
            unet=stirred(net), scheduler=diffusers.DDIMScheduler(), id2label={0: "boat", 1: "house", 2: "tree"}
        )
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_STUDIO_CACHE", str(tmp_path))


@pytest.mark.parametrize("kind", SESSIONS)
@pytest.mark.parametrize("name", WEIGHT_POLICIES)
def test_what_is_held_is_what_the_bits_say(name: str, kind: str, home: Path) -> None:
    cls, session = WEIGHT_POLICIES[name], SESSIONS[kind](home)
    asked = set(cls.card.traits)
    if session.info.family not in cls.card.families or not asked <= set(session.info.traits):
        return
    with attached(session, cls(**{k: v for k, v in QUICK.items() if k in cls.model_fields})):
        books, metrics = ledger(session), weight_metrics(session)
        replaced = outermost([session.model])
    if books is None:  # it takes modules out and puts none in
        assert "theoretical_weight_bytes" not in metrics
        assert not replaced
        return
    assert books.complaint() == ""
    assert books.held == metrics["weight_bytes"]
    assert abs(books.held - books.explained) <= 0.02 * books.held
    for one in replaced:
        assert sum(one.ledger().values()) == one.nbytes()
        assert min(one.ledger().values()) >= 0


def test_four_bits_by_hand() -> None:
    session = make_session()
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    rows = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)  # of the maps inside the layers
    head, norms, rotary = tiny.VOCAB * 64, 5 * 64, 2 * 8
    groups = linears // 32
    with attached(session, RoundToNearest(bits=4)):  # the head in 8 bits, the embedding as it is
        got = weight_metrics(session)
    assert got["theoretical_weight_bytes"] == linears / 2 + head + FLOAT * (head + norms + rotary)
    assert got["scale_bytes"] == 4 * groups + 2 * tiny.VOCAB
    short = 4 * 32  # rows of the keys and values that fill their blocks of 64, two layers
    assert got["padding_bytes"] == short * (64 // 2 + 4 * 2)
    assert got["weight_bytes"] == sum(got[n] for n in ("theoretical_weight_bytes", "scale_bytes", "padding_bytes"))
    assert rows == 2 * 512


@pytest.mark.parametrize("knobs", [{"bits": 8}, {"bits": 4}, {"bits": 4, "head": "same"}, {"bits": 3, "head": "keep"}])
@pytest.mark.parametrize("tied", [True, False])
def test_the_estimate_before_loading_is_near_what_is_held(knobs: dict[str, Any], tied: bool) -> None:
    """Embeddings that no policy replaces and a head in another format are regarded; norms and padding are left out."""
    session = make_session(tiny.llama_folder(name="llama-tied", tie_word_embeddings=True) if tied else tiny.llama_folder())
    policy = RoundToNearest(**knobs)
    foreseen = needs(session.spec, session.info, session.device, {}).lane([policy])
    with attached(session, policy):
        assert foreseen.weight_bytes == pytest.approx(weight_metrics(session)["weight_bytes"], rel=0.1)


def test_the_bytes_that_a_library_hides_are_in_the_books() -> None:
    session = make_session()
    with attached(session, DynamicInt8()):
        books = ledger(session)
        replaced = outermost([session.model])
    assert books is not None
    assert books.held == books.explained
    assert books.scales == 12 * sum(r.out_features for r in replaced)


def test_a_bare_model_has_no_books() -> None:
    assert ledger(make_session()) is None
    assert "scale_bytes" not in weight_metrics(make_session())


class Boaster(DenseLinear):
    """Says 4 bits and holds floats."""

    bits = 4.0  # type: ignore[assignment]


class Boast(WeightPolicy):
    """Fake quantization, counted as if it were real.

    For the test only.
    """

    card: ClassVar[Card] = card(
        id="boast", title="Boast", stage="quantize", families=("llm",), owns=("weights.format",), effects={"weight_bytes": "down"},
        neutral=None, not_neutral_because="it rounds", alters_weights=True,
    )  # fmt: skip

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        weight: Tensor = source.weight  # type: ignore[assignment]
        return Boaster(weight.detach().clone(), None)


def test_a_lane_that_holds_more_than_its_bits_say_is_flagged() -> None:
    session = make_session()
    lane = Lane(0, Pipeline(), session)
    lane.policies = [Boast()]
    race = Race(session, make_workload(session.spec.workload), [lane])
    events: list[Any] = list(race.prepare(0.0, Item(id="i", prompt_ids=tuple(prompt(8)), max_new_tokens=2)))
    (flag,) = [f for f in lane.flags if f.startswith("bytes: ")]
    held, said = lane.given["weight_bytes"], lane.given["theoretical_weight_bytes"]
    assert flag == (
        f"bytes: its weights hold {held / 1e6:.2f} MB, {held / said - 1:.0%} more than the {said / 1e6:.2f} MB "
        "of its bits, scales and padding"
    )
    sources = {e.name: e.source for e in events if isinstance(e, Metric)}
    assert sources["theoretical_weight_bytes"] == "estimated"
    assert sources["weight_bytes"] == "measured"
    (farewell,) = [e for e in lane.farewell() if isinstance(e, LaneFinished)]
    assert flag in farewell.flags


def test_a_map_inside_another_and_a_map_in_two_places_count_once() -> None:
    inner = DenseLinear(torch.zeros(4, 8), torch.zeros(4))

    class Around(Replacement):
        def __init__(self, inner: Replacement):
            super().__init__(8, 4, inner.bias)
            self.inner: Any = inner

        def matrix(self) -> Tensor:
            return self.inner.matrix()  # type: ignore[no-any-return]

        @classmethod
        def joined(cls, parts: Any) -> Replacement:
            raise NotImplementedError

    model = nn.ModuleList([Around(inner), nn.Linear(3, 3), inner])
    outside = [m for m in outermost([model]) if isinstance(m, Around)]
    assert len(outside) == 1
    books = weight_ledger([nn.ModuleList([Around(inner), nn.Linear(3, 3)])])
    assert books is not None
    assert books.held == books.explained == held_bytes([inner]) + FLOAT * 12
