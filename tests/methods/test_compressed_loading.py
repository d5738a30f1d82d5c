"""Loading straight into packed modules: the same modules and scores as packing afterwards, in bounded memory."""

from __future__ import annotations

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
from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prompt, tokens
from workers.families.llm import LanguageFamily
from workers.mechanisms import attention
from workers.mechanisms.linear import Replacement, held_bytes
from workers.mechanisms.weight_places import Places
from workers.mechanisms.weight_policy import weight_metrics
from workers.models.lazy_load import Compressed, load_compressed
from workers.models.resolve import resolve
from workers.policies.prune.magnitude import Magnitude
from workers.policies.quantize.dynamic_int8 import DynamicInt8
from workers.policies.quantize.rtn import RoundToNearest

TIED = {"name": "llama-tied", "tie_word_embeddings": True}
PIPELINES: dict[str, tuple[Any, ...]] = {
    "rtn 8": (RoundToNearest(),),
    "rtn 4": (RoundToNearest(bits=4, head="same"),),
    "rtn, head kept": (RoundToNearest(bits=4, head="keep"),),
    "dynamic-int8": (DynamicInt8(),),
    "magnitude, then rtn": (Magnitude(sparsity=0.5), RoundToNearest(bits=4)),
}


def load(folder: Path, *policies: Any) -> Compressed:
    return load_compressed(resolve(str(folder)), policies, LanguageFamily(), torch.float32, attn_implementation=attention.NAME)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("policies", PIPELINES.values(), ids=list(PIPELINES))
def test_same_modules_and_scores_as_packing_afterwards(policies: tuple[Any, ...], tied: bool) -> None:
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
