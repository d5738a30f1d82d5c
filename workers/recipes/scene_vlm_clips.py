"""The scene model with several frames a prompt, and a small CLIP beside it that compares a question with frames.

Shapes: B clips of 8 frames of 96 x 96 pixels, 144 tokens each: 1,152 image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from studio_state.catalog import Card, asset
from workers.data.clips import CLIP_KINDS, FRAMES, make_clip
from workers.data.scenes import make_scene
from workers.mechanisms.clip_scorer import SCORER
from workers.methods import card, knob
from workers.recipe import Recipe, Trained, hand_over
from workers.training.clip_lessons import (
    CLIPS,
    all_whole,
    drawn_reading,
    frames_seen,
    questions_about,
    reading_loss,
    score_clips,
)
from workers.training.loop import Schedule, TrainingRun, fit
from workers.training.scene_lessons import Taught, asked, normalized, views_of, whole
from workers.training.scene_models import SETTLED, TOKENS, processor, scene_model
from workers.training.scene_scorer import score_scorer, scored_pairs, scorer_model, scorer_tokenizer, scoring_loss

SCORED_SEED = 1  # of the clips that are scored; the workload's are of the experiment's seed
SCENES_EVERY = 5  # one step in so many is about single scenes
DATA = "clips of coloured shapes with exact answers, drawn by the studio itself; no outside data"


class SceneVLMClips(Recipe):
    """Teach the scene model to read clips, and a CLIP to find the frames and patches that a question names.

    Radford et al. 2021, arXiv:2103.00020, for the scorer: the vision tower is that of ``scene-vlm``, fixed; a text tower
    of two layers and both projections learn by contrast, and which patches show what is named. The language model
    and the projector go on from ``scene-vlm`` with clips of eight frames, some of them whole, all of them pooled; one
    step in five is about single scenes, so that these are not forgotten. The scorer lies in the folder ``scorer``.
    """

    card: ClassVar[Card] = card(
        id="scene-vlm-clips",
        title="LLaVA on clips of coloured shapes",
        kind="recipe",
        families=("vlm",),
        paper="arXiv:2304.08485",
    )

    start: str = knob("", help="folder of a trained scene-vlm; empty = the one that comes with the studio")
    score_steps: int = knob(300, ge=1, le=1_000_000, help="steps of the scorer; more = frames are found more surely")
    steps: int = knob(800, ge=1, le=1_000_000, help="steps with a few whole frames and all of them pooled; more = better answers")
    long_steps: int = knob(
        250, ge=1, le=1_000_000, help="last steps, every other one with all frames whole; more = better answers"
    )
    batch_size: int = knob(8, ge=1, le=4096, help="clips a step, each with nine questions")
    learning_rate: float = knob(8e-4, gt=0, le=0.1, help="highest learning rate")
    width: int = knob(64, ge=32, le=1024, multiple_of=32, help="hidden size of the scorer's text tower; more = slower")

    def train(self, run: TrainingRun) -> Trained:
        """Train the scorer, then the reader; score on clips that the training never drew."""
        torch.manual_seed(run.seed)
        base, tokenizer = scene_model(Path(self.start) if self.start else asset("zoo/scene-vlm"))
        base.set_attn_implementation("sdpa")
        words = scorer_tokenizer(tokenizer)
        untrained = scorer_model(base.model.vision_tower, words, self.width)

        def scoring(net: nn.Module, step: int) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return scoring_loss(net, words, *scored_pairs(run.rng("score", step), 6 * self.batch_size))

        schedule = Schedule(
            self.score_steps, 3 * self.learning_rate, warmup=min(100, self.score_steps // 10 + 1), average=SETTLED
        )
        scorer = fit(run, "score", untrained, schedule, scoring).to(torch.bfloat16)
        base.model.vision_tower.requires_grad_(False)
        taught = Taught(base)
        start = [tokenizer.bos_token_id, tokenizer.get_vocab()["user"]]

        def reading(phase: str) -> Callable[[nn.Module, int], Tensor]:
            def loss_of(net: nn.Module, step: int) -> Tensor:
                rng = run.rng(phase, step)
                with torch.autocast("cpu", torch.bfloat16):
                    if step % SCENES_EVERY == 0:
                        scenes = [make_scene(rng) for _ in range(self.batch_size)]
                        batch = asked(tokenizer, base.config.image_token_id, TOKENS, scenes, rng, "compare")
                        return taught.answering_loss(batch, normalized(views_of([whole(s) for s in scenes]).images), None)
                    is_long = phase == "long" and step % 2 == 1
                    clips = [make_clip(rng) for _ in range(max(1, self.batch_size // 2) if is_long else self.batch_size)]
                    how = all_whole(len(clips), FRAMES) if is_long else drawn_reading(rng, len(clips), FRAMES)
                    tokens = how.tokens(frames_seen(base, clips))
                    return reading_loss(base, questions_about(clips, tokenizer, rng), tokens, start)

            return loss_of

        schedule = Schedule(self.steps, self.learning_rate, warmup=min(50, self.steps // 10 + 1), average=SETTLED)
        fit(run, "clips", base, schedule, reading("clips"))
        schedule = Schedule(self.long_steps, self.learning_rate / 2, warmup=min(20, self.long_steps // 10 + 1), average=SETTLED)
        model: Any = fit(run, "long", base, schedule, reading("long")).to(torch.bfloat16)
        ready = processor(tokenizer)
        ready.save_pretrained(run.out)
        scorer.save_pretrained(run.out / SCORER)  # type: ignore[operator]
        words.save_pretrained(run.out / SCORER)
        clips = CLIPS if run.examples is None else max(1, run.examples // len(CLIP_KINDS))
        scores, examples = score_clips(model, ready, SCORED_SEED, run.tell, clips)
        return hand_over(
            run,
            self,
            model,
            steps={"score": self.score_steps, "clips": self.steps, "long": self.long_steps},
            scores={**scores, **score_scorer(scorer, words, SCORED_SEED, clips)},
            examples=examples,
            data=DATA,
            licence="Apache-2.0",
            limits="It knows clips and scenes of the kind it was trained on and the words of their questions; films mean nothing to it.",
        )
