"""SmolLM2's FFNs as experts: the mixture computes what the dense model computes, with fewer experts what is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from studio_state.errors import ModelError
from tests import tiny
from workers.models.expert_split import EXPERTS, Plan, assemble, check_plan, dense_config, read_plan, save_plan

IDS = torch.randint(3, tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
ROUNDED = 1e-4  # the experts' weights are 1/8 to a few millionths


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance over length."""
    return float((a - b).norm() / b.norm())


def some_plan(config: Any, seed: int = 0) -> Plan:
    """Neurons in random groups of one size, and a random router."""
    pen = torch.Generator().manual_seed(seed)
    groups = torch.arange(config.intermediate_size) % EXPERTS
    rows = [groups[torch.randperm(len(groups), generator=pen)] for _ in range(config.num_hidden_layers)]
    router = torch.randn(config.num_hidden_layers, EXPERTS, config.hidden_size, generator=pen)
    return Plan(torch.stack(rows).to(torch.uint8), router.to(torch.float16))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Plan, Path]:
    """The dense model, the mixture, the plan between them, and the mixture's folder."""
    out, dense = tmp_path_factory.mktemp("mixture"), tiny.llama_folder()
    plan = some_plan(dense_config(dense))
    assemble(dense, plan, out)
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (dense, out)]
    return (*models, plan, out)


@torch.inference_mode()
def test_with_all_experts_it_is_the_dense_model(pair: tuple[Any, Any, Plan, Path]) -> None:
    dense, mixture, _, _ = pair
    assert apart(mixture(IDS).logits, dense(IDS).logits) < ROUNDED


@torch.inference_mode()
def test_with_fewer_it_is_the_dense_model_without_those_neurons(pair: tuple[Any, Any, Plan, Path]) -> None:
    """The reference masks, token by token, the neurons of the experts that the plan's router ranks lowest."""
    dense, mixture, plan, _ = pair
    kept, hooks = 5, []

    def masking(layer: int, mlp: Any) -> Any:
        def forward(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = args[0]
            ranked = (x @ plan.router[layer].float().T).topk(kept, -1).indices  # [B, L, 5]
            chosen = torch.zeros(*x.shape[:-1], EXPERTS).scatter_(-1, ranked, 1.0)
            part = chosen[..., plan.assignment[layer].long()]  # [B, L, F]
            return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * part)

        return mlp.register_forward_hook(forward)

    for number, block in enumerate(dense.model.layers):
        hooks.append(masking(number, block.mlp))
    for block in mixture.model.layers:
        block.mlp.gate.top_k = kept
    try:
        assert apart(mixture(IDS).logits, dense(IDS).logits) < ROUNDED
    finally:
        for hook in hooks:
            hook.remove()
        for block in mixture.model.layers:
            block.mlp.gate.top_k = EXPERTS


def test_a_plan_comes_back_as_it_was_written(tmp_path: Path) -> None:
    plan = some_plan(dense_config(tiny.llama_folder()))
    save_plan(plan, tmp_path / "experts.safetensors")
    again = read_plan(tmp_path / "experts.safetensors")
    assert torch.equal(again.assignment, plan.assignment)
    assert torch.equal(again.router, plan.router)


def test_plans_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = dense_config(tiny.llama_folder())
    plan = some_plan(config)
    with pytest.raises(ModelError, match="this model needs"):
        check_plan(plan._replace(router=plan.router[:1]), config)
    uneven = plan.assignment.clone()
    uneven[0] = 0
    with pytest.raises(ModelError, match="experts of layer 0"):
        check_plan(plan._replace(assignment=uneven), config)
    with pytest.raises(ModelError, match="no numbers"):
        check_plan(plan._replace(router=plan.router * float("nan")), config)
    with pytest.raises(ModelError, match="not there or damaged"):
        read_plan(tmp_path / "nothing.safetensors")
    with pytest.raises(ModelError, match="only a Llama without biases"):
        dense_config(tiny.qwen3_folder())
