"""Loading straight into packed modules: the same modules and scores as packing afterwards, in bounded memory."""

from __future__ import annotations

import itertools
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from studio_state.errors import ModelError
from studio_state.pipeline import parse_pipeline
from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prompt, tokens
from tests.sampling import sampled
from workers.families.llm import LanguageFamily
from workers.mechanisms import attention
from workers.mechanisms.linear import Replacement, held_bytes
from workers.mechanisms.weight_places import Places
from workers.mechanisms.weight_policy import WeightPolicy, weight_metrics
from workers.methods import discover, effective
from workers.models.lazy_load import Compressed, load_compressed
from workers.models.resolve import resolve
from workers.plan import needs_whole_model
from workers.policies.prune.magnitude import Magnitude
from workers.policies.quantize.dfloat11 import DFloat11
from workers.policies.quantize.dynamic_int8 import DynamicInt8
from workers.policies.quantize.flash_llm import FlashLLM
from workers.policies.quantize.rtn import RoundToNearest

TIED = {"name": "llama-tied", "tie_word_embeddings": True}
PIPELINES: dict[str, tuple[Any, ...]] = {
    "rtn 8": (RoundToNearest(),),
    "rtn 4": (RoundToNearest(bits=4, head="same"),),
    "rtn, head kept": (RoundToNearest(bits=4, head="keep"),),
    "dynamic-int8": (DynamicInt8(),),
    "magnitude, then rtn": (Magnitude(sparsity=0.5), RoundToNearest(bits=4)),
    "dfloat11": (DFloat11(),),
    "flash-llm": (FlashLLM(),),
}


def load(folder: Path, *policies: Any) -> Compressed:
    return load_compressed(resolve(str(folder)), policies, LanguageFamily(), torch.float32, attn_implementation=attention.NAME)


@pytest.mark.parametrize(("name", "tied"), sampled(itertools.product(PIPELINES, (True, False)), 3))
def test_same_modules_and_scores_as_packing_afterwards(name: str, tied: bool) -> None:
    policies = PIPELINES[name]
    folder = tiny.llama_folder(**TIED) if tied else tiny.llama_folder()
    after, during = make_session(folder), make_session(folder)
    during.model, during.built[Places] = load(folder, *policies)
    with attached(after, *policies), attached(during, *policies):
        for name, module in after.model.named_modules():
            other = during.model.get_submodule(name)
            if isinstance(module, Replacement):
                assert type(other) is type(module)
                assert torch.equal(other.matrix(), module.matrix())
        assert weight_metrics(during) == weight_metrics(after)
        assert torch.equal(forced(during, prompt(40), prompt(8, seed=5)), forced(after, prompt(40), prompt(8, seed=5)))
        assert tokens(generate(during, [prompt(20)])) == tokens(generate(after, [prompt(20)]))
    assert during.acted[policies[-1].card.id] == after.acted[policies[-1].card.id]


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors held at the same time, seen after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref[Tensor]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in (*args, *(out if isinstance(out, tuple | list) else [out])):
            if isinstance(t, Tensor) and not t.is_meta:
                self.alive[id(t)] = weakref.ref(t)
        live = [t for t in (ref() for ref in self.alive.values()) if t is not None]
        self.alive = {id(t): weakref.ref(t) for t in live}
        self.peak = max(self.peak, sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in live}.values()))
        return out


def test_memory_is_the_packed_model_and_one_matrix_at_work() -> None:
    """12 layers: all float matrices together are far above the bound, the rounding of one of them is not."""
    folder = tiny.llama_folder(name="llama-deep", num_hidden_layers=12, hidden_size=128, intermediate_size=256)
    with LiveBytes() as live:
        model, _ = load(folder, RoundToNearest(bits=4))
    largest = tiny.VOCAB * 128 * 4
    packed = held_bytes([model])
    dense = sum(t.bytes for t in resolve(str(folder)).tensors.values())
    assert packed < live.peak <= packed + 5 * largest
    assert live.peak < dense - largest


def test_sharded_files_load_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny.llama_folder()
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, parts = load(source, RoundToNearest()).model, load(tmp_path, RoundToNearest()).model
    ids = torch.tensor([prompt(20)])
    assert torch.equal(parts(ids).logits, whole(ids).logits)


@pytest.mark.parametrize(
    "pipeline", ["rtn:bits=8", "rtn:bits=8,modules=*.gate_up_proj.*", "magnitude+rtn", "rtn:modules=*.self_attn.*"]
)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_experts_are_packed_one_by_one(kind: str, pipeline: str) -> None:
    """The files hold them one by one under other names than the library's tensors."""
    policies: Any = effective(parse_pipeline(pipeline))
    folder = tiny.moe_folder(kind)
    after, during = make_session(folder), make_session(folder)
    during.model, during.built[Places] = load(folder, *policies)
    packed = {n for n, m in during.model.named_modules() if isinstance(m, Replacement) and m.replaces}
    with attached(after, *policies), attached(during, *policies):
        assert packed == {n for n, m in after.model.named_modules() if isinstance(m, Replacement) and m.replaces}
        assert weight_metrics(during) == weight_metrics(after)
        assert torch.equal(forced(during, prompt(40), prompt(8, seed=5)), forced(after, prompt(40), prompt(8, seed=5)))


def test_experts_that_lie_in_one_tensor_are_read_one_by_one_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tiny.moe_folder()
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    model = make_session(source).model
    save_file({k: t.contiguous() for k, t in model.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"})
    whole, pieces = load(tmp_path, RoundToNearest()).model, load(source, RoundToNearest()).model
    ids = torch.tensor([prompt(20)])
    assert torch.equal(whole(ids).logits, pieces(ids).logits)


def test_memory_is_bounded_by_one_expert_not_by_a_layer_of_them() -> None:
    folder = tiny.moe_folder(num_local_experts=16, intermediate_size=256)
    with LiveBytes() as live:
        model, _ = load(folder, RoundToNearest(bits=8))
    expert, layer = 4 * 2 * 256 * 64, 16 * 4 * 3 * 256 * 64
    packed = held_bytes([model])
    assert packed < live.peak <= packed + 5 * expert
    assert live.peak < packed + layer / 2


@pytest.mark.parametrize("prefix", [True, False])
def test_the_transposed_maps_of_gpt2_load_compressed(prefix: bool, tmp_path: Path) -> None:
    """With the names of today's files, and with those of the published ones, which have no prefix."""
    from safetensors.torch import load_file, save_file

    source = tiny.gpt2_folder()
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    if not prefix:
        weights = {k.removeprefix("transformer."): t for k, t in load_file(source / "model.safetensors").items()}
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    policy = RoundToNearest(bits=4)
    after, during = make_session(source), make_session(source)
    during.model, during.built[Places] = load(tmp_path, policy)
    with attached(after, policy), attached(during, policy):
        assert weight_metrics(during)["replaced_modules"] == weight_metrics(after)["replaced_modules"] == 9
        assert torch.equal(forced(during, prompt(40), prompt(8, seed=5)), forced(after, prompt(40), prompt(8, seed=5)))


def test_policies_that_need_the_whole_model_are_told_from_those_that_do_not() -> None:
    """By what their classes say of themselves; a new one is sorted at once."""
    info = make_session().info
    for name, cls in discover().items():
        if not issubclass(cls, WeightPolicy):
            continue
        why = needs_whole_model(info, [cls()])
        assert bool(why) == (cls.wants is not None or cls.plan is not WeightPolicy.plan), name
        if why:
            assert f"{name} looks at" in why or f"{name} decides" in why
            assert "\n" not in why
    assert "the parts of a pipeline are loaded whole" in needs_whole_model(info.model_copy(update={"family": "diffusion"}), [])


def test_missing_and_misshapen_weights_give_one_sentence(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.llama_folder(), tmp_path, dirs_exist_ok=True)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    kept = weights.pop(name)
    save_file(weights, file)
    with pytest.raises(ModelError, match=f"lack the weight {name}"):
        load(tmp_path, RoundToNearest())
    save_file({**weights, name: kept[:5].contiguous()}, file)
    with pytest.raises(ModelError, match=r"has the shape \(5, 64\), its config says \(128, 64\)"):
        load(tmp_path, RoundToNearest())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
