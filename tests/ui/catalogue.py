"""A small catalogue for tests of the page: every kind of knob, every stage that matters, known conflicts.

The page must work for any catalogue, so these tests do not depend on the texts of the real one.
"""

from __future__ import annotations

from typing import Any

from studio_state.catalog import Card, Catalog, WorkloadCard
from studio_state.resources import Use

KEEP = {"type": "number", "default": 0.5, "minimum": 0.05, "maximum": 1.0, "description": "share of prompt positions kept"}
EVICTS = (("kv.length", "owns"), ("kv.rollback", "spoils"))


def _card(
    id: str,
    title: str,
    stage: str | None,
    knobs: dict[str, Any],
    uses: tuple[tuple[str, str], ...] = (),
    family: str = "llm",
    **more: Any,
) -> Card:
    return Card(
        id=id, title=title, summary=f"{title}, in one sentence.", stage=stage, families=(family,),  # type: ignore[arg-type]
        knobs={"type": "object", "additionalProperties": False, "properties": knobs},
        resources=tuple(Use(resource=r, mode=m) for r, m in uses), **more,  # type: ignore[arg-type]
    )  # fmt: skip


def catalogue() -> Catalog:
    """Policies of six stages, a recipe and two workloads."""
    group = {"type": "integer", "default": 64, "minimum": 16, "maximum": 256, "multipleOf": 16, "fits": "divides-widths"}
    items = {"type": "integer", "default": 2, "minimum": 1, "maximum": 50, "description": "number of items"}
    return Catalog(
        methods=[
            _card("magnitude", "Magnitude pruning", "prune", {"sparsity": {**KEEP, "minimum": 0}}, (("weights.mask", "owns"),)),
            _card("rtn", "Round to nearest", "quantize", {"bits": {"type": "integer", "enum": [4, 8], "default": 4}, "group_size": group},
                  (("weights.format", "owns"),), effects={"weight_bytes": "down"}),
            _card("fastv", "FastV", "tokens", {"keep": KEEP}, (("tokens.visual", "owns"),), family="vlm"),
            _card("snapkv", "SnapKV", "kv", {"keep": KEEP, "window": {"type": "integer", "default": 32, "minimum": 1, "maximum": 512}}, EVICTS),
            _card("h2o", "H2O", "kv", {"keep": KEEP, "recent": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}], "default": None}}, EVICTS),
            _card("kivi", "KIVI", "kv", {"bits": {"type": "integer", "enum": [2, 4, 8], "default": 2}, "residual": {"type": "boolean", "default": True}},
                  (("kv.dtype", "owns"),)),
            _card("prompt-lookup", "Prompt lookup", "decode", {"tokens": {"type": "integer", "default": 8, "minimum": 1, "maximum": 32}},
                  (("decode.loop", "owns"), ("kv.rollback", "needs"))),
            _card("lean-decode", "Lean decode", "runtime", {}, (("runtime.step", "owns"),)),
            _card("step-cache", "Step cache", "denoise", {"every": {"type": "integer", "default": 3, "minimum": 1, "maximum": 20}},
                  (("denoise.reuse", "owns"),), family="diffusion"),
            _card("fashion-vit", "ViT on Fashion-MNIST", None, {"steps": {"type": "integer", "default": 9, "minimum": 1}}, family="vit", kind="recipe"),
        ],
        workloads=[
            WorkloadCard(id="prompts", title="Prompts", summary="Runs prompts.", families=("llm", "vlm"), metrics=("accuracy",), detects="Small shifts.",
                         options={"type": "object", "properties": {"items": items, "file": {"type": "string", "default": ""}}}),
            WorkloadCard(id="needle", title="Needle in a novel", families=("llm",), metrics=("accuracy",), detects="Losses.",
                         options={"type": "object", "properties": {"items": items, "length": {"type": "integer", "default": 512, "minimum": 64}}}),
            WorkloadCard(id="generate-images", title="Generate images", summary="Draws pictures.", families=("diffusion",), metrics=("psnr", "ssim"), detects="Shifts.",
                         options={"type": "object", "properties": {
                             "prompts": {"type": "string", "default": "", "format": "lines", "maxLength": 20_000, "description": "what to draw, one a line"},
                             "items": items, "steps": {"type": "integer", "default": 20, "minimum": 1, "maximum": 1000}}}),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    print(catalogue().model_dump_json(indent=1))
