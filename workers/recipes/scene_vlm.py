"""A small vision-language model that answers questions about scenes: the studio's VLM.

Shapes: B scenes, 96 x 96 pixels, patch 8 gives 144 image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from studio_state.catalog import Card
from workers.data.scenes import WORDS, make_scene
from workers.methods import card, knob
from workers.recipe import Recipe, Trained, hand_over
from workers.training.loop import Schedule, TrainingRun, fit
from workers.training.scene_lessons import PATCH, VIEW, Lesson, Placed, Taught, asked, mixed_view, normalized, views_of, whole
from workers.training.scene_models import TOKENS, processor
from workers.training.scene_scores import scenes_for, score_scenes
from workers.training.word_tokenizer import IMAGE, word_tokenizer

DATA = "scenes of coloured shapes with exact answers, drawn by the studio itself; no outside data"


class SceneVLM(Recipe):
    """Train a LLaVA model on scenes of coloured shapes.

    Liu et al. 2023, arXiv:2304.08485: a CLIP vision tower, a two-layer projector and a Llama
    language model, 1.5 M parameters in all. First the tower learns what lies under each patch and
    (through CLS) in the whole view; then everything learns to describe and to answer, then to say where named
    objects are, to point at them, and at last how two of them stand to each other. New scenes every step.
    """

    card: ClassVar[Card] = card(
        id="scene-vlm", title="LLaVA on scenes of coloured shapes", kind="recipe", families=("vlm",), paper="arXiv:2304.08485"
    )

    see_steps: int = knob(1500, ge=1, le=1_000_000, help="steps of the vision tower alone; more = shapes are learned more surely")
    steps: int = knob(7000, ge=1, le=1_000_000, help="steps of the whole model; more = better answers")
    relate_steps: int = knob(
        2500, ge=1, le=1_000_000, help="further steps with the places of named objects; more = better relations"
    )
    compare_steps: int = knob(2500, ge=1, le=1_000_000, help="further steps, with many relations; more = better relations")
    decide_steps: int = knob(
        2500, ge=1, le=1_000_000, help="last steps, with how two objects stand to each other; more = better relations"
    )
    batch_size: int = knob(24, ge=1, le=4096, help="scenes a step, each with eight questions")
    learning_rate: float = knob(1.2e-3, gt=0, le=0.1, help="highest learning rate")
    layers: int = knob(4, ge=2, le=48, help="layers of the tower and of the language model; more = slower and better")
    width: int = knob(128, ge=64, le=1024, multiple_of=32, help="hidden size of both; more = slower and better")

    def train(self, run: TrainingRun) -> Trained:
        """Train tower, then all; score on scenes that the training never drew."""
        torch.manual_seed(run.seed)
        tokenizer = word_tokenizer(WORDS)
        taught = Taught(self.model(tokenizer))
        tower = taught.model.model.vision_tower

        def seeing(net: nn.Module, step: int) -> Tensor:
            rng = run.rng("see", step)
            views = views_of([mixed_view(rng) for _ in range(2 * self.batch_size)])
            with torch.autocast("cpu", torch.bfloat16):
                seen = tower(normalized(views.images), output_hidden_states=True, return_dict=True)
                return taught.seeing_loss(seen.hidden_states, seen.pooler_output, views)

        fit(run, "see", taught, Schedule(self.see_steps, self.learning_rate, warmup=min(200, self.see_steps // 5 + 1)), seeing)

        def answering(phase: str, lesson: Lesson, *heads: Any) -> Callable[[nn.Module, int], Tensor]:
            def loss_of(net: nn.Module, step: int) -> Tensor:
                rng = run.rng(phase, step)
                scenes = [make_scene(rng) for _ in range(self.batch_size)]
                batch = asked(tokenizer, taught.model.config.image_token_id, TOKENS, scenes, rng, lesson)
                views = views_of([whole(s) for s in scenes])
                with torch.autocast("cpu", torch.bfloat16):
                    return taught.answering_loss(batch, normalized(views.images), views, *heads)

            return loss_of

        schedule = Schedule(self.steps, self.learning_rate, warmup=min(300, self.steps // 10 + 1))
        fit(run, "answer", taught, schedule, answering("answer", "describe"))
        schedule = Schedule(self.relate_steps, self.learning_rate, warmup=min(200, self.relate_steps // 10 + 1))
        fit(run, "relate", taught, schedule, answering("relate", "relate"))
        placed = Placed(taught)
        schedule = Schedule(self.compare_steps, self.learning_rate, warmup=min(200, self.compare_steps // 10 + 1))
        fit(run, "compare", placed, schedule, answering("compare", "compare", placed.place_head))
        schedule = Schedule(self.decide_steps, self.learning_rate, warmup=min(200, self.decide_steps // 10 + 1))
        best = fit(run, "decide", placed, schedule, answering("decide", "compare", placed.place_head, placed.relation_heads))
        model = best.taught.model.to(torch.bfloat16)  # type: ignore[union-attr, operator]
        ready = processor(tokenizer)
        ready.save_pretrained(run.out)
        scores, examples = score_scenes(model, ready, run.tell, scenes_for(run.examples))
        return hand_over(
            run,
            self,
            model,
            steps={
                "see": self.see_steps,
                "answer": self.steps,
                "relate": self.relate_steps,
                "compare": self.compare_steps,
                "decide": self.decide_steps,
            },
            scores=scores,
            examples=examples,
            data=DATA,
            licence="Apache-2.0",
            limits="It knows scenes of the kind it was trained on and the words of its six kinds of question; photographs mean nothing to it.",
        )

    def model(self, tokenizer: Any) -> Any:
        """The untrained network; eager attention trains fastest on a CPU."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        vision = CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 32,
            image_size=VIEW,
            patch_size=PATCH,
            projection_dim=self.width,
        )
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 32,
            num_key_value_heads=self.width // 64,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=TOKENS,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlavaForConditionalGeneration(config)
        model.set_attn_implementation("eager")
        return model
