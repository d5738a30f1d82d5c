"""Questions about images: does a model still see what it saw, when a policy takes image tokens or cache away?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from studio_state.catalog import WorkloadCard
from studio_state.errors import WorkloadError
from workers.cards import knob
from workers.data.photos import package_photos
from workers.data.pictures import FilePicture
from workers.data.scenes import KINDS, Question, ScenePicture, held_out_scene
from workers.workloads.asked_kinds import asked, kinds_in
from workers.workloads.base import Grade, Item, ItemContext, ItemResult, Workload
from workers.workloads.detects import accuracies
from workers.workloads.image_tables import Listed, checked, given_images
from workers.workloads.prompts import contains
from workers.workloads.texts import refuse_binary
from workers.workloads.tokens import encode, require_room

SOURCES = ("scenes", "photos")
PHOTO_TOKENS = 48
BLIND = {96: 0.37, 192: 0.39}  # by size: the most frequent answer of each kind, over 300 held-out scenes (a test counts them)
OPEN_PROMPTS = {
    "describe": "Describe the picture.",
    "foreground": "What is in the foreground?",
    "background": "What is in the background?",
    "colors": "Which colors stand out in the picture?",
    "place": "Where was the picture taken, and how can you tell?",
}


class VQA(Workload):
    """Asks about scenes whose every answer is known, about photographs, or about images of one's own.

    Scenes are drawn by the studio and were in no training of its models; each is asked questions of
    several kinds in turn, and its answer is one word. Photographs come with installed packages and
    have no right answers. In a file of one's own an answer is right if the text contains it as whole
    words, whatever the case.
    """

    card: ClassVar[WorkloadCard] = WorkloadCard(
        id="vqa",
        title="Questions about images",
        families=("vlm",),
        metrics=("accuracy",),
        detects=accuracies("questions", (60, 300, 1200))
        + " A model that does not see, and always gives the most frequent answer of each kind of question, is right in "
        + f"{100 * BLIND[96]:.0f} % of those about scenes of 96 pixels ({100 * BLIND[192]:.0f} % of 192).",
        chance=BLIND[96],
    )
    source: str = knob(
        "scenes",
        min_length=1,
        max_length=4096,
        format="path",
        examples=list(SOURCES),
        help="scenes = synthetic ones with known answers; photos = photographs of installed packages, no right answers; else the "
        "path of a folder of images, or of a CSV, TSV or JSONL file with columns image, question and (optional) answer",
    )
    items: int = knob(
        60, ge=1, le=10_000, help="number of questions, at most as many as the source has; more = smaller differences"
    )
    kinds: str = knob(
        ",".join(KINDS),
        max_length=400,
        help="kinds of question about scenes, separated by commas; each scene is asked all of them",
    )
    scene_size: Literal[96, 192] = knob(96, help="edge of a scene in pixels; larger = more image tokens, smaller objects in them")
    question: str = knob(
        "What is in this picture?", max_length=4000, help="asked of every image of a folder; files bring their own questions"
    )

    def make_items(self, ctx: ItemContext) -> list[Item]:
        """The questions, whatever the seed: fewer are a beginning of more.

        Raises:
            WorkloadError: an option names nothing that can be asked, a file or image cannot be used, or a question is
                longer than the model's context.
        """
        if self.source == "scenes":
            return self._about_scenes()
        if self.source == "photos":
            return self._about_photos()
        images = given_images(self.source, SOURCES, ("question",), ("answer",))[: self.items]
        items = [self._about_file(image) for image in checked(images)]
        for image, item in zip(images, items, strict=True):
            if ctx.tokenizer is not None:
                needed = len(encode(ctx.tokenizer, item.prompt)) + 1
                require_room(ctx, needed, f"the question of {image.source or image.id}", "shorten it")
        return items

    def _about_scenes(self) -> list[Item]:
        def drawn(n: int) -> tuple[ScenePicture, Sequence[Question]]:
            scene, questions = held_out_scene(self.scene_size, n)
            return ScenePicture(scene), questions

        return asked(self.items, kinds_in(self.kinds, KINDS), "scene", drawn)

    def _about_photos(self) -> list[Item]:
        photos = package_photos()
        each = [(path, kind, prompt) for kind, prompt in OPEN_PROMPTS.items() for path in photos]
        return [
            Item(
                id=f"{path.stem}-{kind}",
                prompt=prompt,
                image=FilePicture(path),
                max_new_tokens=PHOTO_TOKENS,
                data={"kind": kind},
            )
            for path, kind, prompt in each[: self.items]
        ]

    def _about_file(self, image: Listed) -> Item:
        """One image of a folder or a table.

        Raises:
            WorkloadError: its question is missing, blank or binary, or its answer is not one.
        """
        question = image.cells.get("question") if image.source else self.question
        if not isinstance(question, str) or not question.strip():
            empty = f"{image.source} has no text in column 'question'" if image.source else "the question is empty"
            raise WorkloadError(f"{empty}; write what is to be asked")
        refuse_binary(question, f"the question of {image.source}" if image.source else "the question")
        answers = answers_of(image.cells.get("answer"), image.source)
        return Item(
            id=image.id,
            prompt=question,
            image=FilePicture(image.path),
            expected=" | ".join(answers) or None,
            max_new_tokens=PHOTO_TOKENS,
            data={"kind": "file", "answers": answers},
        )

    def grade(self, result: ItemResult) -> Grade:
        """A scene's answer is exactly the first word; a file's answer, or one of several, is in the text."""
        data = {"kind": result.item.data.get("kind", "")}
        answers: Sequence[str] = result.item.data.get("answers", ())
        if not answers:
            return Grade(text=result.text, data=data)
        if data["kind"] in KINDS:
            correct = first_word(result.text) in answers
        else:
            correct = any(contains(result.text, answer) for answer in answers)
        return Grade(correct=correct, text=result.text, metrics={"accuracy": float(correct)}, data=data)


def first_word(text: str) -> str:
    """The first word in lower case; punctuation and emphasis around it do not matter."""
    found = re.search(r"[^\W_]+", text)
    return found.group().casefold() if found else ""


def answers_of(value: Any, source: str) -> list[str]:
    """The right answers in a cell: a text, a number, alternatives separated by ``|``, or a list of texts and numbers.

    Raises:
        WorkloadError: it is something else.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [answer for part in value.split("|") if (answer := part.strip())]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, list) and not any(isinstance(v, list) or v is None for v in value):
        return [answer for v in value for answer in answers_of(v, source)]
    raise WorkloadError(
        f"{source} has {type(value).__name__} in column 'answer'; an answer is text or a number, several are a list or a|b"
    )
