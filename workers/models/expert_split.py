"""A dense Llama as a mixture of experts: its own FFN neurons in eight groups, and a router that ranks the groups.

An FFN is a sum over its neurons, so it is also the sum of its eight groups: with all of them it computes what the dense
model computes, with fewer a token leaves whole groups out (Zhang et al. 2022, arXiv:2110.01786, section 3). Which neuron
belongs where, and the router, are a :class:`Plan`; here they only take their places in the library's Qwen2-MoE, the one
class that has Llama's attention (no norm of queries and keys; its biases can be switched off) and sums the chosen experts
without normalising their weights to 1. Its shared expert, which it cannot do without, has weights of zero.

The router's logits are so small (``ROUTER_SCALE``) that the softmax of eight of them is 1/8 but for rounding, and still
ranks the experts; the experts' down projections carry the factor 8. Both factors are powers of two, so no weight is rounded.

Shapes: L layers; F neurons of an FFN; C hidden width; S width of the shared expert.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio_state.errors import ModelError
from workers.models import weights_files

EXPERTS = 8
ROUTER_SCALE = 2.0**-18
"""Of logits whose standard deviation is about 1. The weights of experts are then 1/8 to some 4e-6 of it, a few times what
rounding moves; and float32 near 1/8 still ranks experts as the logits do, but for one token in a hundred, whose experts at
the edge of the choice differ by less than a hundredth of a deviation."""

PLAN_FILE = "experts.safetensors"
_FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")
_WITH_THE_WEIGHTS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
    "rope_parameters", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


class Plan(NamedTuple):
    """How the neurons of every layer are grouped, and what ranks the groups.

    Attributes:
        assignment: uint8 [L, F], the expert of each neuron; every expert of a layer has F / 8 of them.
        router: float16 [L, 8, C], logits of a layer input, with a standard deviation of about 1.
    """

    assignment: Tensor
    router: Tensor


def save_plan(plan: Plan, file: Path) -> None:
    """Write a plan."""
    save_file({name: tensor.contiguous() for name, tensor in plan._asdict().items()}, file)


def read_plan(file: Path) -> Plan:
    """Read a plan.

    Raises:
        ModelError: not there, damaged, or something else.
    """
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as e:
        raise ModelError(f"the plan {file} is not there or damaged ({e}); make it again with the recipe smollm2-moe8") from e
    if set(found) != set(Plan._fields):
        raise ModelError(
            f"{file} holds {', '.join(sorted(found)) or 'nothing'}, a plan holds {' and '.join(Plan._fields)}; give a plan"
        )
    return Plan(**found)


def dense_config(folder: Path) -> Any:
    """The config of a dense model that can be split.

    Raises:
        ModelError: it is no Llama without biases, or its FFNs cannot be cut into eight equal parts.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        kind = config.model_type + (" with biases" if config.model_type == "llama" else "")
        raise ModelError(f"{folder} is a {kind} model; only a Llama without biases can be split into experts")
    if config.intermediate_size % EXPERTS:
        raise ModelError(
            f"{folder} has FFNs of {config.intermediate_size} neurons, which {EXPERTS} experts cannot share equally; "
            f"give a model with a multiple of {EXPERTS}"
        )
    return config


def check_plan(plan: Plan, config: Any) -> None:
    """See that a plan is one for a model.

    Raises:
        ModelError: made for another shape, of other number formats, or uneven.
    """
    layers, neurons, width = config.num_hidden_layers, config.intermediate_size, config.hidden_size
    wanted = {"assignment": (torch.uint8, (layers, neurons)), "router": (torch.float16, (layers, EXPERTS, width))}
    for name, (dtype, shape) in wanted.items():
        given: Tensor = getattr(plan, name)
        if (given.dtype, tuple(given.shape)) != (dtype, shape):
            raise ModelError(
                f"the plan's {name} is {_words(given.dtype, given.shape)}, this model needs {_words(dtype, shape)}; "
                "give the plan that was made for it"
            )
    counts = torch.stack([torch.bincount(row.long(), minlength=EXPERTS) for row in plan.assignment])
    if counts.shape[1] != EXPERTS or (counts != neurons // EXPERTS).any():
        layer = next(i for i, row in enumerate(counts) if len(row) != EXPERTS or (row != neurons // EXPERTS).any())
        raise ModelError(
            f"the plan gives the experts of layer {layer} {counts[layer].tolist()} neurons; each of {EXPERTS} needs {neurons // EXPERTS}"
        )
    if not plan.router.isfinite().all():
        raise ModelError("the plan's router holds values that are no numbers; make the plan again")


def _words(dtype: torch.dtype, shape: tuple[int, ...] | torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, shape))}]"


def moe_config(dense: Any) -> Any:
    """The config of the mixture: the dense model's own numbers, and all eight experts a token.

    The shared expert is as narrow as lets every group of weights that divides the dense widths divide its width too.
    """
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(
        **{name: getattr(dense, name) for name in _SAME},
        architectures=["Qwen2MoeForCausalLM"],
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS,
        moe_intermediate_size=dense.intermediate_size // EXPERTS,
        shared_expert_intermediate_size=math.gcd(dense.hidden_size, dense.intermediate_size, 256),
        norm_topk_prob=False,
        qkv_bias=False,
        router_aux_loss_coef=0.0,
    )


def assemble(dense: Path, plan: Plan, out: Path, say: Callable[[str, float | None], None] = lambda text, done: None) -> None:
    """Write the mixture: config, weights in the dense files' number format, tokenizer, chat template, generation config.

    Args:
        dense: checkpoint folder of a Llama, safetensors.
        out: folder that receives it.
        say: told progress as (text, share done).

    Raises:
        ModelError: a model that cannot be split, or a plan that is not one for it.
    """
    config = dense_config(dense)
    check_plan(plan, config)
    new = moe_config(config)
    neurons = [row.long().argsort(stable=True) for row in plan.assignment]  # an expert's neurons in their old order
    made: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(f, framework="pt")) for f in weights_files.files(str(dense), dense)]
        keys = [(key, file) for file in files for key in file.keys()]  # noqa: SIM118 (a safe_open file is no dict)
        for i, (key, file) in enumerate(keys):
            if (match := _FFN.fullmatch(key)) is None:
                made[key] = file.get_tensor(key)
                continue
            say("regrouping the neurons", i / len(keys))
            layer, part = int(match[1]), match[2]
            grouped = _grouped(file.get_tensor(key), neurons[layer], part)
            if part == "down":
                made[f"model.layers.{layer}.mlp.experts.down_proj"] = grouped
            else:
                made[f"{layer}.{part}"] = grouped
    for layer in range(config.num_hidden_layers):
        gate, up = (made.pop(f"{layer}.{part}") for part in ("gate", "up"))
        block = f"model.layers.{layer}.mlp"
        made[f"{block}.experts.gate_up_proj"] = torch.cat([gate, up], 1)  # [8, 2F / 8, C]
        made[f"{block}.gate.weight"] = (plan.router[layer].float() * ROUTER_SCALE).to(gate.dtype)
        for name, shape in _shared_shapes(new).items():
            made[f"{block}.{name}.weight"] = torch.zeros(shape, dtype=gate.dtype)
    say("saving", None)
    save_file(made, out / "model.safetensors", {"format": "pt"})
    _write_config(new, dense, out)
    for name in _WITH_THE_WEIGHTS:
        if (dense / name).is_file():
            shutil.copyfile(dense / name, out / name)


def _grouped(weight: Tensor, neurons: Tensor, part: str) -> Tensor:
    """Rows (of gate and up) or columns (of down) of each expert: [8, F / 8, C] or [8, C, F / 8]."""
    if part != "down":
        return weight[neurons].unflatten(0, (EXPERTS, -1))
    return (EXPERTS * weight[:, neurons]).unflatten(1, (EXPERTS, -1)).transpose(0, 1).contiguous()


def _shared_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """The linear maps of the shared expert and of its gate, [outputs, inputs]."""
    narrow, width = config.shared_expert_intermediate_size, config.hidden_size
    return {
        "shared_expert.gate_proj": (narrow, width),
        "shared_expert.up_proj": (narrow, width),
        "shared_expert.down_proj": (width, narrow),
        "shared_expert_gate": (1, width),
    }


def _write_config(config: Any, dense: Path, out: Path) -> None:
    """The config, with the number format that the dense one names."""
    config.save_pretrained(out)
    named = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    written |= {"dtype": named.get("dtype") or named.get("torch_dtype") or "float32"}
    (out / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
