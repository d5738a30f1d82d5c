"""Exported models: what the policies packed, written once and made again bit for bit; refusals; byte counts.

A new policy that replaces weights is covered at once, by exporting the tiny Llama (or the mixture) with it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from studio_state.errors import ModelError, SpecError, StudioError
from studio_state.experiment import ExperimentSpec
from studio_state.pipeline import Pipeline, Step, parse_pipeline
from studio_state.problems import pipeline_problems
from tests import tiny, tiny_vision
from tests.methods.drawing import OWN, draw, pipeline_folder, same_pictures
from tests.methods.driving import attached, folder_for, forced, generate, image_item, make_session, prompt, run_items, tokens
from tests.sampling import first, sampled
from workers.export_model import Request, export
from workers.host import ModelHost
from workers.mechanisms.linear import Lookup, Replacement
from workers.mechanisms.weight_policy import weight_metrics
from workers.methods import catalogue, discover, effective
from workers.models.packed_recipe import PackedRecipe
from workers.models.packed_save import header_bytes
from workers.models.resolve import resolve
from workers.session import Session

WEIGHT_POLICIES = [n for n, cls in discover().items() if cls.card.changes_weights]
LLM_POLICIES = [n for n in WEIGHT_POLICIES if "llm" in discover()[n].card.families]
TIED = {"name": "llama-tied", "tie_word_embeddings": True}
QUICK = {"samples": 1, "steps": 1, "tokens": 64}  # knobs that cost time only
WORKLOADS = {"llm": "speed", "vit": "classify", "vlm": "vqa", "diffusion": "generate-images"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_STUDIO_CACHE", str(tmp_path / "cache"))


def write(model: Path, pipeline: str, out: Path, **more: Any) -> PackedRecipe:
    return export(Request(model=str(model), pipeline=parse_pipeline(pipeline), out=out, **more))


def opened(model: Path, dtype: str = "float32") -> Session:
    """A session as the engine opens one."""
    host = ModelHost()
    info = host.inspect(ExperimentSpec(model=str(model), workload={"id": "speed"}))
    spec = ExperimentSpec(model=str(model), workload={"id": WORKLOADS[info.family]}, dtype=dtype)
    if info.family == "diffusion":
        spec = spec.model_copy(update={"workload": spec.workload.model_copy(update={"options": {"steps": 4}})})
    return host.open(spec, info, torch.device("cpu"))[0]


def read(session: Session) -> tuple[list[list[int]], torch.Tensor]:
    """What a language model says, and how sure it is."""
    return tokens(generate(session, [prompt(24)], new=12)), forced(session, prompt(40), prompt(8, seed=5))


@pytest.mark.parametrize("name", sampled(LLM_POLICIES, 5))
def test_every_weight_policy_is_stored_and_made_again(name: str, tmp_path: Path) -> None:
    cls = discover()[name]
    folder, knobs = folder_for(cls.card), {k: v for k, v in QUICK.items() if k in cls.model_fields}
    recipe = write(folder, Pipeline(steps=(Step(policy=name, knobs=knobs),)).text(), tmp_path / "packed")
    assert recipe.complaint == ""
    lane, packed = make_session(folder), opened(tmp_path / "packed")
    with attached(lane, cls.model_validate(knobs)):
        wanted, held = read(lane), weight_metrics(lane)
        kinds = {n: type(m) for n, m in lane.model.named_modules() if isinstance(m, Replacement)}
    got = read(packed)
    assert got[0] == wanted[0]
    assert torch.equal(got[1], wanted[1])
    assert weight_metrics(packed) == held
    assert {n: type(m) for n, m in packed.model.named_modules() if isinstance(m, Replacement)} == kinds
    assert packed.acted == {}  # it is a baseline


STACKS = [
    (lambda: tiny.llama_folder(**TIED), "rtn:bits=4,head=same"),
    (lambda: tiny.llama_folder(**TIED), "rtn:bits=3,head=keep"),
    (lambda: tiny.llama_folder(**TIED), "dynamic-int8"),
    (tiny.llama_folder, "magnitude+rtn:bits=4"),
    (tiny.gpt2_folder, "rtn:bits=4"),
    (tiny.gpt2_folder, "dfloat11"),
    (lambda: tiny.llama_folder(**TIED), "magnitude+dfloat11"),
    (tiny.llama_folder, "magnitude:sparsity=0.8+flash-llm"),
    (tiny.moe_folder, "rtn:modules=*.gate_up_proj.*"),
    (tiny.moe_folder, "expert-prune:tokens=64+rtn"),
    (tiny.moe_folder, "expert-prune:tokens=64+rtn:modules=*.self_attn.*"),
    (lambda: tiny.moe_folder("qwen2_moe"), "magnitude+expert-prune:tokens=64"),
]


@pytest.mark.parametrize(
    ("folder", "pipeline"),
    sampled(STACKS, 5, text=lambda case: case[1]),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_stacks_and_shapes(folder: Any, pipeline: str, tmp_path: Path) -> None:
    base = folder()
    recipe = write(base, pipeline, tmp_path / "packed")
    lane, packed = make_session(base), opened(tmp_path / "packed")
    with attached(lane, *effective(parse_pipeline(pipeline))):
        wanted, held = read(lane), weight_metrics(lane)
    got = read(packed)
    assert got[0] == wanted[0]
    assert torch.equal(got[1], wanted[1])
    assert weight_metrics(packed) == held
    assert recipe.complaint == ""


def test_shared_tensors_lie_in_the_file_once_and_are_shared_again(tmp_path: Path) -> None:
    base = tiny.llama_folder(**TIED)
    recipe = write(base, "rtn:bits=4", tmp_path / "packed")
    model: Any = opened(tmp_path / "packed").model
    assert isinstance(model.model.embed_tokens, Lookup)
    assert model.model.embed_tokens.table is model.lm_head
    assert recipe.modules["lm_head"].same == "model.embed_tokens.table"
    kept = write(base, "rtn:bits=4,head=keep", tmp_path / "kept")
    assert kept.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    with safe_open(tmp_path / "kept" / "model.safetensors", "pt") as f:
        assert sum(f.get_tensor(k).numel() == tiny.VOCAB * 64 for k in f.keys()) == 1  # noqa: SIM118
    model = opened(tmp_path / "kept").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_gguf_file_becomes_a_folder(tmp_path: Path) -> None:
    recipe = write(tiny.gguf_llama(), "rtn:bits=4", tmp_path / "packed")
    lane, packed = opened(tiny.gguf_llama()), opened(tmp_path / "packed")
    with attached(lane, *effective(parse_pipeline("rtn:bits=4"))):
        wanted = read(lane)
    got = read(packed)
    assert got[0] == wanted[0]
    assert torch.equal(got[1], wanted[1])
    assert (recipe.dtype, packed.info.parameters) == ("float32", lane.info.parameters)
    assert packed.processor.encode("a good fortune") == lane.processor.encode("a good fortune")
    assert not list((tmp_path / "packed").glob("*.gguf"))


def test_the_byte_table_is_what_lies_there(tmp_path: Path) -> None:
    recipe = write(tiny.llama_folder(), "rtn:bits=4", tmp_path / "packed")
    table, file = recipe.bytes, tmp_path / "packed" / "model.safetensors"
    assert table.base == 558_400  # 139,584 parameters and two rotary buffers of 8, float32
    assert table.on_disk == file.stat().st_size
    assert table.header == header_bytes(file)
    assert table.on_disk - table.header == table.in_memory - table.computed  # what is held is what is stored
    assert table.computed == 2 * 8 * 4
    assert table.theoretical + table.scales + table.padding == table.in_memory
    off = table.model_copy(update={"on_disk": 2 * table.on_disk})
    assert off.complaint().startswith("the byte counts disagree: the file holds ")
    assert table.model_copy(update={"theoretical": 0}).complaint().startswith("the byte counts disagree: bits, scales")


def test_what_is_known_of_it_comes_from_the_base(tmp_path: Path) -> None:
    write(tiny.llama_folder(), "rtn:bits=4", tmp_path / "packed")
    packed, base = opened(tmp_path / "packed").info, make_session().info
    assert (packed.family, packed.parameters, packed.dtype, packed.layers) == ("llm", base.parameters, base.dtype, base.layers)
    assert set(packed.traits) == {*base.traits, "packed"}
    assert packed.packed == "rtn:bits=4 of llama"
    assert packed.fingerprint not in ("", base.fingerprint)
    kinds = {p.suffix for p in (tmp_path / "packed").iterdir()}
    assert kinds <= {".json", ".jinja", ".safetensors", ".md"}  # no pickle
    assert str(tiny.root()) not in (tmp_path / "packed" / "pareto.json").read_text()  # it may be published
    assert "rtn:bits=4" in (tmp_path / "packed" / "README.md").read_text()


def test_another_number_format_moves_what_is_not_packed(tmp_path: Path) -> None:
    write(tiny.llama_folder(), "magnitude:modules=*.mlp.*+rtn:bits=4,modules=*.self_attn.*", tmp_path / "packed")
    model: Any = opened(tmp_path / "packed", "bfloat16").model
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == layer.input_layernorm.weight.dtype == torch.bfloat16
    assert layer.self_attn.q_proj.packed.dtype == torch.uint8
    assert model(torch.tensor([prompt(8)])).logits.dtype == torch.bfloat16
    write(tiny.llama_folder(), "rtn", tmp_path / "half", dtype="bfloat16")
    assert opened(tmp_path / "half").model.model.norm.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_policies_for_a_packed_model(tmp_path: Path) -> None:
    """Those that replace weights are refused, for the packed ones are no originals; the others run on it."""
    write(tiny.llama_folder(), "rtn:bits=4", tmp_path / "packed")
    session = opened(tmp_path / "packed")
    for name in WEIGHT_POLICIES:
        found = [p.message for p in pipeline_problems(parse_pipeline(name), catalogue(), session.info)]
        assert any("are packed already (rtn:bits=4 of llama)" in m or "needs a model with the trait" in m for m in found), name
    assert not pipeline_problems(parse_pipeline("snapkv+lean-decode"), catalogue(), session.info)
    plain = tokens(generate(session, [prompt(24)], new=12))
    with attached(session, *effective(parse_pipeline("lean-decode"))):
        assert tokens(generate(session, [prompt(24)], new=12)) == plain
    with pytest.raises(SpecError, match="packed already"):
        write(tmp_path / "packed", "rtn", tmp_path / "again")


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        ("snapkv", "snapkv changes how a model runs, not its weights"),
        ("rtn+snapkv+lean-decode", "snapkv, lean-decode change how a model runs"),
        ("", "the pipeline is empty"),
        ("magnitude:sparsity=0.0", "replaces no weight"),
        ("rtn:modules=*.nothing", "matches no linear map"),
        ("rtn:bits=9", "bits"),
        ("rtn+dynamic-int8", "keep one of them"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_sentence(pipeline: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=said) as refused:
        write(tiny.llama_folder(), pipeline, tmp_path / "packed")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "packed").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".packed")]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SpecError, match="is there already; give a new or empty folder"):
        write(tiny.llama_folder(), "rtn", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_operators_that_know_one_number_format_say_so_when_it_is_loaded(tmp_path: Path) -> None:
    recipe = write(tiny.llama_folder(), "dynamic-int8", tmp_path / "packed")
    assert (recipe.dtypes, recipe.devices, recipe.dtype) == (("float32",), ("cpu",), "float32")
    with pytest.raises(ModelError, match=r"was packed by dynamic-int8, which works in float32; set dtype = float32"):
        opened(tmp_path / "packed", "bfloat16")


def damaged(source: Path, folder: Path, change: Any) -> Path:
    """A copy of an exported model whose recipe was changed."""
    shutil.copytree(source, folder)
    recipe = json.loads((folder / "pareto.json").read_text())
    change(recipe)
    (folder / "pareto.json").write_text(json.dumps(recipe))
    return folder


def test_damage_gives_one_sentence(tmp_path: Path) -> None:
    good, name = tmp_path / "packed", "model.layers.0.mlp.up_proj"
    write(tiny.llama_folder(), "rtn:bits=4", good)

    def says(folder: Path, sentence: str) -> None:
        with pytest.raises(ModelError, match=sentence) as failed:
            opened(folder)
        assert "\n" not in str(failed.value)

    def of_class(made_of: str) -> Any:
        return lambda r: r["modules"][name].update(made_of=made_of)

    says(damaged(good, tmp_path / "a", of_class("workers.mechanisms.packed_linear:NoSuch")), "does not have; install the version")
    says(damaged(good, tmp_path / "b", of_class("os:system")), r"names the class 'os:system', which this version")
    says(damaged(good, tmp_path / "c", of_class("workers.mechanisms.linear:DenseLinear")), "cannot be made again as")
    says(damaged(good, tmp_path / "d", lambda r: r["modules"][name]["facts"].clear()), "cannot be made again as")
    says(
        damaged(good, tmp_path / "e", lambda r: r["modules"].update({"model.nowhere": r["modules"][name]})),
        "which its model does not have",
    )
    says(damaged(good, tmp_path / "f", lambda r: r.pop("pipeline")), "is damaged .pipeline: ")
    says(damaged(good, tmp_path / "g", lambda r: r.update(format=9)), "has the format 9, this version of Pareto Studio reads 1")
    says(damaged(good, tmp_path / "h", lambda r: r["modules"]["lm_head"].update(same="elsewhere")), "which is not there")
    (tmp_path / "a" / "pareto.json").write_text("{")
    says(tmp_path / "a", "is damaged")
    for missing, sentence in (
        (f"{name}.packed", "lack .*up_proj.packed, which its module"),
        ("model.norm.weight", "lack model.norm.weight"),
    ):
        folder = tmp_path / missing
        shutil.copytree(good, folder)
        weights = load_file(folder / "model.safetensors")
        del weights[missing]
        save_file(weights, folder / "model.safetensors")
        says(folder, sentence)
    save_file(
        {**load_file(good / "model.safetensors"), "model.norm.weight": torch.zeros(3)}, tmp_path / "b" / "model.safetensors"
    )
    shutil.copyfile(good / "pareto.json", tmp_path / "b" / "pareto.json")
    says(tmp_path / "b", r"has the shape \(3,\), its config says \(64,\)")


def test_stopping_leaves_nothing(tmp_path: Path) -> None:
    from workers.session import Cancelled

    request = Request(model=str(tiny.llama_folder()), pipeline=parse_pipeline("rtn"), out=tmp_path / "packed")
    with pytest.raises(Cancelled):
        export(request, is_cancelled=lambda: True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_fits_only_packed_is_exported_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tiny.moe_folder(), "rtn", tmp_path / "whole")
    monkeypatch.setattr("workers.models.fit.free_memory", lambda device="cpu": 10**9)
    from workers import plan

    host = ModelHost()
    spec = ExperimentSpec(model=str(tiny.moe_folder()), workload={"id": "prompts"})
    needs = plan.needs(spec, host.inspect(spec), torch.device("cpu"), {})
    monkeypatch.setattr(
        "workers.models.fit.free_memory", lambda device="cpu": needs.baseline.total - needs.baseline.weight_bytes // 4
    )
    small = write(tiny.moe_folder(), "rtn", tmp_path / "small")
    assert (
        load_file(tmp_path / "small" / "model.safetensors").keys() == load_file(tmp_path / "whole" / "model.safetensors").keys()
    )
    assert small.bytes.on_disk == whole.bytes.on_disk
    assert torch.equal(read(opened(tmp_path / "small"))[1], read(opened(tmp_path / "whole"))[1])
    monkeypatch.setattr("workers.models.fit.free_memory", lambda device="cpu": 1000)
    with pytest.raises(StudioError, match="no lane compresses it enough"):
        write(tiny.moe_folder(), "rtn", tmp_path / "none")


@pytest.mark.parametrize("pipeline", ["rtn", "magnitude+dynamic-int8"])
@pytest.mark.parametrize("folder", [tiny_vision.vit_folder, tiny_vision.dinov2_folder, tiny_vision.clip_vision_folder])
def test_vision_transformers(folder: Any, pipeline: str, tmp_path: Path) -> None:
    recipe = write(folder(), pipeline, tmp_path / "packed")
    lane, packed = opened(folder()), opened(tmp_path / "packed")
    item = image_item("classify")
    with attached(lane, *effective(parse_pipeline(pipeline))):
        wanted, held = run_items(lane, [item]), weight_metrics(lane)
    got = run_items(packed, [item])
    for mine, theirs in zip([*got.logits, *got.features], [*wanted.logits, *wanted.features], strict=True):
        assert torch.equal(mine, theirs)
    assert len([*got.logits, *got.features]) > 0
    assert weight_metrics(packed) == held
    assert recipe.complaint == ""
    assert packed.info.traits == tuple(sorted({*lane.info.traits, "packed"}))


def test_models_that_see_and_speak(tmp_path: Path) -> None:
    folder = tiny_vision.llava_folder()
    write(folder, "rtn", tmp_path / "packed")
    lane, packed = opened(folder), opened(tmp_path / "packed")
    with attached(lane, *effective(parse_pipeline("rtn"))):
        wanted = run_items(lane, [image_item()])
    got = run_items(packed, [image_item()])
    assert tokens(got) == tokens(wanted)
    assert (tmp_path / "packed" / "scorer" / "model.safetensors").is_file()  # the model that lies beside it


@pytest.mark.parametrize("kind", first(2, OWN, "pixart", "stable-diffusion"))
def test_diffusion_pipelines(kind: str, tmp_path: Path) -> None:
    from tests.tiny_diffusion import BUILDERS

    assert kind == OWN or kind in BUILDERS
    home = tiny.root() / "pipelines"
    home.mkdir(parents=True, exist_ok=True)
    folder = pipeline_folder(kind, home)
    recipe = write(folder, "rtn", tmp_path / "packed")
    lane, packed = opened(folder), opened(tmp_path / "packed")
    wanted = draw(lane, *effective(parse_pipeline("rtn")), seeds=(5,))
    assert same_pictures(draw(packed, seeds=(5,)), wanted)
    assert not same_pictures(draw(lane, seeds=(5,)), wanted)
    assert recipe.complaint == ""
    assert not list((tmp_path / "packed").rglob("*/*.safetensors"))  # one file holds all parts
    assert resolve(str(tmp_path / "packed")).packed is not None
    assert packed.info.traits == tuple(sorted({*lane.info.traits, "packed"}))
