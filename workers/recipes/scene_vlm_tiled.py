"""The scene model with tiles: a larger image is seen as a whole and in four parts.

Shapes: B scenes of 192 x 192 pixels, 5 views of 96 x 96 (whole image, 2 x 2 tiles) of 144 tokens each; with the
line breaks between rows of tiles 144 + 24 x 25 = 744 image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from studio_state.catalog import Card, asset
from studio_state.errors import StudioError
from workers.data.scenes import Scene, make_scene
from workers.methods import card, knob
from workers.recipe import Recipe, Trained, hand_over
from workers.training.loop import Schedule, TrainingRun, fit
from workers.training.scene_lessons import PATCH, VIEW, Lesson, Placed, Taught, asked, halved, normalized, tile, views_of
from workers.training.scene_models import SETTLED, scene_model
from workers.training.scene_scores import scenes_for, score_scenes
from workers.training.word_tokenizer import IMAGE

SIZE = 2 * VIEW
GRID = [[VIEW, SIZE], [SIZE, VIEW], [SIZE, SIZE]]
SIDE = VIEW // PATCH
TOKENS = SIDE**2 + 2 * SIDE * (2 * SIDE + 1)
KEPT = 0.1  # weight of what the tower must not forget: objects at full size
DATA = "scenes of coloured shapes with exact answers, drawn by the studio itself; no outside data"


class TiledSceneVLM(Recipe):
    """Teach the scene model to look at larger scenes in tiles.

    Liu et al. 2024 (LLaVA-NeXT): the image is seen as a whole, half as large, and in four tiles at full size. Starts
    from a trained ``scene-vlm``. First it learns to answer about the half-sized whole, with the positions between image
    and question left free that the tiles will take (a tower that never saw objects this small counts none of them);
    then, the tower held fixed, to find its way among the tiles.
    """

    card: ClassVar[Card] = card(
        id="scene-vlm-tiled",
        title="LLaVA-NeXT on scenes of coloured shapes",
        kind="recipe",
        families=("vlm",),
        paper="arXiv:2310.03744",
    )

    start: str = knob("", help="folder of a trained scene-vlm; empty = the one that comes with the studio")
    whole_steps: int = knob(
        2500, ge=1, le=1_000_000, help="steps with the whole view alone; more = small objects are seen better"
    )
    steps: int = knob(1500, ge=1, le=1_000_000, help="steps with all five views; more = better answers")
    settle_steps: int = knob(1000, ge=1, le=1_000_000, help="last steps, where counts are learned; more = better counts")
    batch_size: int = knob(
        8, ge=1, le=4096, help="scenes a step with all views, and half as many as a step with the whole view alone"
    )
    learning_rate: float = knob(8e-4, gt=0, le=0.1, help="highest learning rate")

    def train(self, run: TrainingRun) -> Trained:
        """Train the whole view, then all views; score on scenes that the training never drew."""
        torch.manual_seed(run.seed)
        base, tokenizer = scene_model(Path(self.start) if self.start else asset("zoo/scene-vlm"))
        placed = Placed(Taught(base))

        def whole_view(net: nn.Module, step: int) -> Tensor:
            rng = run.rng("whole", step)
            scenes = [make_scene(rng, SIZE) for _ in range(2 * self.batch_size)]
            batch = asked(tokenizer, base.config.image_token_id, SIDE**2, scenes, rng, lesson(step), gap=TOKENS - SIDE**2)
            seen = views_of([halved(s) for s in scenes])
            cuts = views_of([tile(s, *(VIEW * int(v) for v in rng.integers(0, 2, 2))) for s in scenes[: self.batch_size]])
            taught = placed.taught
            with torch.autocast("cpu", torch.bfloat16):
                loss = taught.answering_loss(batch, normalized(seen.images), seen, placed.place_head, placed.relation_heads)
                of_cuts = base.model.vision_tower(normalized(cuts.images), output_hidden_states=True, return_dict=True)
                return loss + KEPT * taught.seeing_loss(of_cuts.hidden_states, of_cuts.pooler_output, cuts)

        schedule = Schedule(self.whole_steps, self.learning_rate, warmup=min(200, self.whole_steps // 10 + 1))
        whole = fit(run, "whole", placed, schedule, whole_view)
        model, ready = tiled(whole.taught.model, tokenizer)  # type: ignore[union-attr]
        placed = Placed(Taught(model))
        for part in ("place_head", "relation_heads"):
            getattr(placed, part).load_state_dict(getattr(whole, part).state_dict())
        for fixed in (model.model.vision_tower, placed.taught.patch_head, placed.taught.name_head, placed.taught.count_head):
            fixed.requires_grad_(False)

        def all_views(phase: str) -> Callable[[nn.Module, int], Tensor]:
            def loss_of(net: nn.Module, step: int) -> Tensor:
                rng = run.rng(phase, step)
                scenes = [make_scene(rng, SIZE) for _ in range(self.batch_size)]
                batch = asked(tokenizer, model.config.image_token_id, TOKENS, scenes, rng, lesson(step))
                sizes = torch.tensor([[SIZE, SIZE]] * len(scenes))
                with torch.autocast("cpu", torch.bfloat16):
                    return placed.taught.answering_loss(
                        batch, views(scenes), None, placed.place_head, placed.relation_heads, image_sizes=sizes
                    )

            return loss_of

        schedule = Schedule(self.steps, self.learning_rate, warmup=min(200, self.steps // 10 + 1))
        fit(run, "tiles", placed, schedule, all_views("tiles"))
        # Counts come last, from the weights themselves: an average over the steps before counts too few.
        schedule = Schedule(
            self.settle_steps, self.learning_rate / 2, warmup=min(50, self.settle_steps // 10 + 1), average=SETTLED
        )
        best = fit(run, "settle", placed, schedule, all_views("settle")).taught.model.to(torch.bfloat16)  # type: ignore[union-attr, operator]
        ready.save_pretrained(run.out)
        scores, examples = score_scenes(best, ready, run.tell, scenes_for(run.examples), SIZE)
        return hand_over(
            run,
            self,
            best,
            steps={"whole": self.whole_steps, "tiles": self.steps, "settle": self.settle_steps},
            scores=scores,
            examples=examples,
            data=DATA,
            licence="Apache-2.0",
            limits="It knows scenes of the kind it was trained on and the words of its six kinds of question; photographs mean nothing to it.",
        )


def lesson(step: int) -> Lesson:
    """Relations and counts in turn: what is hardest."""
    return "count" if step % 2 else "compare"


def tiled(base: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The scene model in a class that tiles images, and its processor.

    Raises:
        StudioError: the weights are not those of a scene model.
    """
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil, LlavaNextProcessor

    config = LlavaNextConfig(
        vision_config=base.config.vision_config,
        text_config=base.config.text_config,
        image_grid_pinpoints=GRID,
        **{
            k: getattr(base.config, k)
            for k in ("image_token_id", "vision_feature_layer", "vision_feature_select_strategy", "tie_word_embeddings")
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaNextForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    if unexpected or set(missing) - {"model.image_newline"}:
        raise StudioError(f"this is no scene-vlm: its weights have other names than the tiled model's ({missing or unexpected})")
    model.set_attn_implementation("sdpa")  # at 900 tokens twice as fast as eager, to train on a CPU
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": VIEW},
        crop_size={"height": VIEW, "width": VIEW},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_grid_pinpoints=GRID,
    )
    ready = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    )
    return model, ready


def views(scenes: Sequence[Scene]) -> Tensor:
    """The five views of each scene [B, 5, 3, 96, 96], from -1 to 1, as the processor makes them."""
    from PIL import Image

    found: list[NDArray[np.uint8]] = []
    for scene in scenes:
        pixels = np.asarray(scene.image)
        found.append(np.asarray(scene.image.resize((VIEW, VIEW), Image.Resampling.BICUBIC)))
        found += [pixels[y : y + VIEW, x : x + VIEW] for y in (0, VIEW) for x in (0, VIEW)]
    return normalized(np.stack(found)).unflatten(0, (len(scenes), 5))
