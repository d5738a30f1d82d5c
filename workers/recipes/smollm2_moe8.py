"""SmolLM2's own FFNs as eight experts a layer: a mixture of experts of real weights, without any training.

Shapes: B rows of L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.data.novels import held_out
from workers.methods import card, knob
from workers.models import expert_split
from workers.models.expert_split import PLAN_FILE
from workers.models.load import Loaded, load_model
from workers.models.resolve import Resolved, resolve
from workers.recipe import Recipe, Trained, hand_over_facts
from workers.training.expert_choice import choosing
from workers.training.expert_groups import PHASE, group_neurons
from workers.training.loop import TrainingRun
from workers.training.novel_lessons import WINDOW, likelihood
from workers.workloads.texts import novel
from workers.workloads.tokens import encode

SCORED = 4096  # tokens
FEWER = (7, 6)  # experts a token that are scored


class SmolLM2MoE8(Recipe):
    """Split the FFNs of a dense Llama into eight experts by co-activation, with a router fitted by ridge regression.

    Zhang et al. 2022 (MoEfication), arXiv:2110.01786, section 3: an FFN is the sum of groups of its neurons, and a token may
    leave groups out. Neurons that are active on the same tokens of a calibration text come into one group (k-means with
    groups of one size). The router foresees from a layer's input the logarithm of the norm of each group's output. With all
    eight experts the model computes what the dense one computes.

    Deviations: activity is that of CMoE (Pei et al. 2025, arXiv:2502.04416), since SiLU has no zeros: the quarter of the neurons
    with the largest part in a token's output; the router is linear and fitted in closed form, not a trained MLP; nothing is
    fine-tuned. Each layer sees the inputs of the dense model.

    The text is the beginning of what is held out of *Persuasion*, which no workload measures on; perplexities are of the end
    of *Pride and Prejudice*. ``oracle`` is not the router's choice but the experts whose outputs are in fact the largest.
    """

    card: ClassVar[Card] = card(
        id="smollm2-moe8", title="SmolLM2 135M in 8 experts", kind="recipe", families=("llm",), paper="arXiv:2110.01786"
    )

    start: str = knob(
        "smollm2-135m", max_length=4096, format="path", help="the dense model: a Llama without biases, by zoo id or folder"
    )
    tokens: int = knob(3072, ge=64, le=8192, help="tokens of the calibration text; more = steadier groups, slower")
    active: float = knob(0.25, ge=0.01, le=0.9, help="share of the neurons of a layer that count as active on a token")
    rounds: int = knob(20, ge=1, le=200, help="rounds of the k-means at most; more = closer groups, slower")
    ridge: float = knob(
        1.0,
        ge=1e-6,
        le=1e6,
        help="penalty on the router's weights, in mean squares of the input; more = simpler, fits the text less",
    )

    def train(self, run: TrainingRun) -> Trained:
        """Group, assemble, and score the mixture and the dense model."""
        run.say("loading the dense model", None)
        base = resolve(self.start, progress=lambda phase, done, text: run.say(text, done))
        expert_split.dense_config(base.path)
        dense = load_model(base, torch.float32)
        run.out.mkdir(parents=True, exist_ok=True)
        rows = self._rows(dense.tokenizer, base)
        plan = group_neurons(run, dense.model, rows, self.active, self.rounds, self.ridge)
        ids = encode(dense.tokenizer, novel())[-(run.examples or SCORED) - 1 :]
        scores, scored = {"perplexity_dense": perplexity(run, dense, ids)}, len(ids) - 1
        del dense
        expert_split.save_plan(plan, run.out / PLAN_FILE)
        expert_split.assemble(base.path, plan, run.out, run.tell)
        made = resolve(str(run.out))
        split = load_model(made, torch.float32)
        scores["perplexity_8"] = perplexity(run, split, ids)
        for oracle in (False, True):
            for experts in FEWER:
                with choosing(split.model, experts, oracle):
                    scores[f"perplexity_{experts}{'_oracle' if oracle else ''}"] = perplexity(run, split, ids)
        return hand_over_facts(
            run,
            self,
            architecture=type(split.model).__name__,
            parameters=sum(p.numel() for p in split.model.parameters()),
            steps={PHASE: len(plan.assignment)},
            scores=scores,
            examples=scored,
            measured_on="tokens of the end of Pride and Prejudice, which the grouping never saw (number = experts a token)",
            data=f"{base.source}; grouped on the first {rows.numel():,} tokens of the end of Persuasion (public domain)",
            licence=base.entry.licence if base.entry else "other",
            limits=(
                "With all 8 experts it is the dense model. Its experts were not trained as such: each one left out costs quality. All "
                "weigh the same, so with fewer they are to be summed as they are, not scaled up (top-k-experts with renormalise off)."
            ),
            dtype=stored_dtype(made),
            origin=f"The weights of {base.name}, regrouped by Pareto Studio; nothing was trained.",
            work="Grouping",
        )

    def _rows(self, tokenizer: Any, base: Resolved) -> Tensor:
        """The calibration text in rows [B, L] that fit the model's context; what fills no row is left out."""
        ids = encode(tokenizer, held_out())[: self.tokens]
        length = min(WINDOW, len(ids), getattr(base.config, "max_position_embeddings", WINDOW))
        return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def stored_dtype(made: Resolved) -> str:
    """The number format of a checkpoint's weights, in PyTorch's words."""
    named = next(iter(made.tensors.values())).dtype
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(named, named)


def perplexity(run: TrainingRun, loaded: Loaded, ids: Sequence[int]) -> float:
    """Of a text, a token at least with 256 before it but for the first ones."""
    return likelihood(loaded.model, loaded.tokenizer, ids, run.tell)[0]["perplexity"]
