"""Drawing pictures from noise: the same seeds in every lane, so that pictures can be laid side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from studio_state.catalog import WorkloadCard
from studio_state.errors import WorkloadError
from workers.cards import knob
from workers.models.picture_judge import judge_of
from workers.workloads.base import Grade, Item, ItemContext, ItemResult, Workload
from workers.workloads.classify import known_labels
from workers.workloads.detects import accuracies

SHOWN = 5  # classes of an answer
PROMPTS = (
    "a red bicycle leaning against a white wall",
    "a bowl of oranges on a wooden table, morning light",
    "a lighthouse on a cliff under a stormy sky",
    "a portrait of an old sailor, oil painting",
    "a small robot watering flowers in a garden",
    "a snowy street in an old town at night",
)


class GenerateImages(Workload):
    """Draws pictures of every class, or to text prompts, each from its own seed.

    A picture is compared with the baseline's of the same seed (PSNR, SSIM, features), and where the zoo has a
    classifier of the model's classes, with what was asked for.
    """

    card: ClassVar[WorkloadCard] = WorkloadCard(
        id="generate-images",
        title="Generate images",
        families=("diffusion",),
        metrics=("psnr", "ssim", "class_agreement", "feature_similarity", "frechet_distance"),
        detects=accuracies("pictures whose class is judged", (20, 100, 500)),
    )
    prompts: str = knob(
        "",
        max_length=20_000,
        format="lines",
        help="what to draw, one a line: classes by name or number, or texts; empty = every class in turn, or six texts of the studio",
    )
    items: int = knob(20, ge=1, le=10_000, help="number of pictures; more = smaller differences can be shown")
    steps: int = knob(20, ge=1, le=1000, help="denoising steps; more = slower and usually better")
    guidance: float = knob(
        0.0,
        ge=0.0,
        le=30.0,
        help="strength of classifier-free guidance; 0 = the model's own, 1 = none, more = truer to what is asked",
    )
    size: int = knob(
        0, ge=0, le=2048, multiple_of=8, help="edge of the pictures in pixels, for models that read texts; 0 = the model's own"
    )

    def make_items(self, ctx: ItemContext) -> list[Item]:
        """The pictures asked for, each with a seed of its own.

        Raises:
            WorkloadError: a line is no class of the model.
        """
        lines = [line.strip() for line in self.prompts.splitlines() if line.strip()]
        asked = {"steps": self.steps, "guidance": self.guidance or None, "size": self.size}
        if not ctx.labels:
            texts = lines or list(PROMPTS)
            return [
                Item(
                    id=f"picture-{i}",
                    task="draw",
                    chat=False,
                    prompt=texts[i % len(texts)],
                    data={**asked, "seed": ctx.seed + i},
                )
                for i in range(self.items)
            ]
        if self.size:
            raise WorkloadError("the size of this model's pictures is fixed; leave size at 0")
        right = known_labels(lines or ctx.labels, ctx.labels)
        classes = [right[line] for line in lines] if lines else list(ctx.labels)
        place = {name: n for n, name in enumerate(ctx.labels)}
        return [
            Item(
                id=f"picture-{i}",
                task="draw",
                chat=False,
                prompt=(name := classes[i % len(classes)]),
                expected=name if judge_of(ctx.labels) else None,
                data={**asked, "seed": ctx.seed + i, "label": place[name]},
            )
            for i in range(self.items)
        ]

    def grade(self, result: ItemResult) -> Grade:
        """What the judge sees against what was asked for; no judgement where there is no judge."""
        if result.item.expected is None or not result.ranked:
            return Grade(text=result.text)
        best = result.ranked[:SHOWN]
        correct = best[0][0] == result.item.expected
        return Grade(
            correct=correct,
            text=best[0][0],
            metrics={"class_agreement": float(correct)},
            data={"labels": [name for name, _ in best], "probabilities": [p for _, p in best]},
        )

    def summarize(self, results: Sequence[ItemResult]) -> dict[str, float]:
        """Fréchet distance to real pictures, where there are enough and a judge has features for them."""
        judged = [r for r in results if r.drawn is not None and r.item.expected is not None]
        judge = judge_of([str(r.item.expected) for r in judged])
        return dict(judge.frechet([r.drawn for r in judged])) if judge else {}
