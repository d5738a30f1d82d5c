"""Questions about clips: does a model still find the frame and the corner that matter, when a policy drops tokens?"""

from __future__ import annotations

from itertools import count
from typing import ClassVar

from studio_state.catalog import WorkloadCard
from studio_state.errors import WorkloadError
from studio_state.problems import nearest
from workers.cards import knob
from workers.data.clips import CLIP_KINDS, ClipPicture, held_out_clip
from workers.workloads.base import Grade, Item, ItemContext, ItemResult, Workload
from workers.workloads.detects import accuracies
from workers.workloads.vqa import SCENE_TOKENS, first_word

BLIND = 0.34  # the most frequent answer of each kind, over 300 clips of seed 0 (a test counts them)


class VQAClips(Workload):
    """Asks about clips of eight frames in which the object that is asked about is in one or two frames only.

    Clips are drawn by the studio, other ones for every seed, and were in no training of its models: two objects stay,
    three pass by, each in a cell of its own, all with different names. An answer is one word. For models that take several
    images a prompt; others see as many images all the same, and answer as well as they can.
    """

    card: ClassVar[WorkloadCard] = WorkloadCard(
        id="vqa-clips",
        title="Questions about clips",
        families=("vlm",),
        metrics=("accuracy",),
        detects=accuracies("questions", (60, 300, 1200))
        + f" A model that does not see, and always gives the most frequent answer of each kind, is right in {100 * BLIND:.0f} %.",
        chance=BLIND,
    )
    items: int = knob(60, ge=1, le=10_000, help="number of questions; more = smaller differences")
    kinds: str = knob(
        ",".join(CLIP_KINDS),
        max_length=400,
        help="kinds of question, separated by commas; each clip is asked all of them",
    )

    def make_items(self, ctx: ItemContext) -> list[Item]:
        """The questions: fewer are a beginning of more.

        Raises:
            WorkloadError: there is no such kind of question.
        """
        kinds = [word for part in self.kinds.split(",") if (word := part.strip())]
        if not kinds:
            raise WorkloadError(f"kinds is empty; name at least one of {', '.join(CLIP_KINDS)}")
        for word in kinds:
            if word not in CLIP_KINDS:
                hint = nearest(word, list(CLIP_KINDS))
                raise WorkloadError(f"there is no kind of question {word!r}; {hint}allowed: {', '.join(CLIP_KINDS)}")
        items: list[Item] = []
        for n in count():
            clip, questions = held_out_clip(ctx.seed, n)
            for asked in questions:
                if len(items) == self.items:
                    return items
                if asked.kind in kinds:
                    items.append(
                        Item(
                            id=f"clip-{n}-{asked.kind}",
                            prompt=asked.text,
                            image=ClipPicture(clip),
                            expected=asked.answer,
                            max_new_tokens=SCENE_TOKENS,
                            data={"kind": asked.kind},
                        )
                    )
        raise AssertionError("there is no end of clips")

    def grade(self, result: ItemResult) -> Grade:
        """The first word is the answer."""
        correct = first_word(result.text) == result.item.expected
        data = {"kind": result.item.data["kind"]}
        return Grade(correct=correct, text=result.text, metrics={"accuracy": float(correct)}, data=data)
