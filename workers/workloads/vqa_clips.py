"""Questions about clips: does a model still find the frame and the corner that matter, when a policy drops tokens?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from studio_state.catalog import WorkloadCard
from workers.cards import knob
from workers.data.clips import CLIP_KINDS, ClipPicture, ClipQuestion, held_out_clip
from workers.workloads.asked_kinds import asked, kinds_in
from workers.workloads.base import Grade, Item, ItemContext, ItemResult, Workload
from workers.workloads.detects import accuracies
from workers.workloads.vqa import first_word

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

        def drawn(n: int) -> tuple[ClipPicture, Sequence[ClipQuestion]]:
            clip, questions = held_out_clip(ctx.seed, n)
            return ClipPicture(clip), questions

        return asked(self.items, kinds_in(self.kinds, CLIP_KINDS), "clip", drawn)

    def grade(self, result: ItemResult) -> Grade:
        """The first word is the answer."""
        correct = first_word(result.text) == result.item.expected
        data = {"kind": result.item.data["kind"]}
        return Grade(correct=correct, text=result.text, metrics={"accuracy": float(correct)}, data=data)
