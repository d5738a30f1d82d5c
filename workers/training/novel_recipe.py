"""What the recipes for small language models of Jane Austen's novels share: text, tokenizer, steps, scores."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workers.cards import knob
from workers.data.novels import FOLDER, HELD_OUT_CHARACTERS, training_chapters
from workers.recipe import Recipe, Trained, hand_over
from workers.training.loop import Schedule, TrainingRun, fit
from workers.training.novel_lessons import STRIDE, Batch, Rows, as_stream, held_out_ids, likelihood, next_token_loss
from workers.training.novel_tokenizer import novel_tokenizer

HEAD, SHARING = 32, 3  # of the Llamas: width of a head; heads that share keys and values
AVERAGE = 0.99  # of the weights: short, since the learning rate ends at zero
STRETCH = 4  # the long rows are so many times longer, with so many fewer of them
DATA = (
    "Jane Austen's six novels but the end of Persuasion (public domain; text of the R package janeaustenr 1.0.0, whose own code "
    "is under the MIT licence)"
)
LIMITS = (
    "It writes in the manner of Jane Austen and knows nothing else. It has read Pride and Prejudice, from which the studio's "
    "workloads for language models take their texts: likelihoods there are of text that it was trained on."
)
MEASURED_ON = (
    f"tokens (the last {HELD_OUT_CHARACTERS:,} characters of Persuasion, in windows: each token but the first ones with at least "
    f"{STRIDE} before it) that the training never saw"
)


class Ids(NamedTuple):
    """The special tokens as configs name them."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


class NovelRecipe(Recipe):
    """A language model of the novels; subclasses say which, and may add to the loss and to the scores."""

    data: str = knob(FOLDER, help="folder with the data of the R package janeaustenr (Rdata.rdb, Rdata.rdx)")
    steps: int = knob(4000, ge=1, le=1_000_000, help="optimizer steps; more = better, up to about ten passes over the text")
    batch_size: int = knob(8, ge=4, le=4096, multiple_of=STRETCH, help="rows a step")
    length: int = knob(256, ge=8, le=8192, help="tokens a row; more = slower, and longer texts are understood")
    long_share: float = knob(
        0.2, ge=0, le=1, help="share of the steps, the last ones, with a quarter of the rows, each four times as long; 0 = none"
    )
    learning_rate: float = knob(2e-3, gt=0, le=0.1, help="highest learning rate")

    @abstractmethod
    def model(self, ids: Ids, vocabulary: int) -> Any:
        """The untrained network."""

    def check(self, tokenizer: Any) -> None:
        """Refuse before the training what would fail after it.

        Raises:
            SpecError: knobs that do not go together.
            ModelError: a model that is asked for is not there.
        """

    def loss(self, net: Any, batch: Batch) -> Tensor:
        """What a step makes smaller; the forward runs in bfloat16."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(input_ids=batch.ids, use_cache=False).logits
        return next_token_loss(logits, batch.labels)

    def more_scores(self, run: TrainingRun, model: Any, tokenizer: Any, ids: list[int]) -> dict[str, float]:
        """Scores beside perplexity and bits per character, on the held-out tokens."""
        return {}

    @property
    def context(self) -> int:
        """Tokens of the longest rows that are trained."""
        return self.length * (STRETCH if self.long_share else 1)

    def train(self, run: TrainingRun) -> Trained:
        """Learn the tokenizer, train on the novels, score on the held-out part."""
        run.say("reading the novels", None)
        chapters = training_chapters(Path(self.data))
        tokenizer = novel_tokenizer(chapters)
        self.check(tokenizer)
        stream = as_stream(chapters, tokenizer)
        torch.manual_seed(run.seed)
        model = self.model(Ids(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id), len(tokenizer))
        short = Rows(run, "rows", stream, self.length, self.batch_size)
        long = Rows(run, "long rows", stream, STRETCH * self.length, self.batch_size // STRETCH)
        stretched = self.steps - round(self.long_share * self.steps)

        def loss_of(net: nn.Module, step: int) -> Tensor:
            return self.loss(net, short.batch(step) if step < stretched else long.batch(step - stretched))

        schedule = Schedule(self.steps, self.learning_rate, warmup=min(200, self.steps // 10 + 1), average=AVERAGE)
        best: Any = fit(run, "read", model, schedule, loss_of)
        store_half(best)
        tokenizer.save_pretrained(run.out)
        ids = held_out_ids(tokenizer, run.examples)
        scores, scored = likelihood(best, tokenizer, ids, run.tell)
        return hand_over(
            run,
            self,
            best,
            steps={"read": self.steps},
            scores={**scores, **self.more_scores(run, best, tokenizer, ids)},
            examples=scored,
            measured_on=MEASURED_ON,
            data=DATA,
            licence="Apache-2.0",
            limits=LIMITS,
        )


def store_half(model: nn.Module) -> None:
    """Weights in bfloat16, as they are handed over; buffers stay, as after loading: rotary frequencies need float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def small_llama(recipe: NovelRecipe, ids: Ids, vocabulary: int, layers: int, width: int) -> Any:
    """An untrained Llama with grouped queries and one matrix for input and output tokens.

    Args:
        width: hidden size, a multiple of ``HEAD * SHARING``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = width // HEAD
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // SHARING,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        **ids._asdict(),
    )
    return LlamaForCausalLM(config)
