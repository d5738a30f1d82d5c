"""What is in the image, as a classifier says: does it still say so, when a policy thins out what it computes?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from studio_state.catalog import WorkloadCard
from studio_state.errors import WorkloadError
from workers.cards import knob
from workers.data import fashion
from workers.data.photos import package_photos
from workers.data.pictures import FilePicture
from workers.workloads.base import Grade, Item, ItemContext, ItemResult, Workload
from workers.workloads.detects import accuracies
from workers.workloads.image_tables import Listed, checked, given_images, spread

SOURCES = ("fashion", "photos")
SHOWN = 5  # labels in a sentence, classes of an answer


class Classify(Workload):
    """Names the class of clothes whose classes are known, of photographs, or of images of one's own.

    Fashion-MNIST's 10,000 test images ship with the studio. A model without classes (one that only
    gives features) runs all of it without right answers.
    """

    card: ClassVar[WorkloadCard] = WorkloadCard(
        id="classify",
        title="Classify images",
        families=("vit",),
        metrics=("accuracy", "kl_to_baseline", "top1_agreement", "feature_similarity"),
        detects=accuracies("labelled images", (200, 1000, 5000)) + " Guessing is right in 1 of 10 images of Fashion-MNIST.",
    )
    source: str = knob(
        "fashion",
        min_length=1,
        max_length=4096,
        format="path",
        examples=list(SOURCES),
        help="fashion = test images of Fashion-MNIST; photos = photographs of installed packages, unlabelled; else the path "
        "of a folder of images (subfolders are the labels), or of a CSV, TSV or JSONL file with columns image and (optional) label",
    )
    items: int = knob(
        200, ge=1, le=10_000, help="number of images, at most as many as the source has; more = smaller differences"
    )

    def make_items(self, ctx: ItemContext) -> list[Item]:
        """The images: of Fashion-MNIST and of labelled folders one of each class in turn, drawn by the seed; else in their order.

        Raises:
            WorkloadError: the source cannot be used, an image in it is none, or labels are not classes of the model.
        """
        if self.source == "fashion":
            return self._from_fashion(ctx)
        if self.source == "photos":
            return [_item(path.stem, FilePicture(path)) for path in package_photos()[: self.items]]
        images = given_images(self.source, SOURCES, (), ("label",))
        labels = {image.id: label_of(image) for image in images}
        _refuse_mixed(self.source, images, labels)
        right = known_labels(labels.values(), ctx.labels)
        if not images[0].source and any(labels.values()):
            drawn = random.Random(f"classify {ctx.seed}").sample(images, len(images))
            images = spread(drawn, lambda image: labels[image.id])
        return [_item(i.id, FilePicture(i.path), right.get(labels[i.id])) for i in checked(images[: self.items])]

    def _from_fashion(self, ctx: ItemContext) -> list[Item]:
        labels = fashion.held_out()[1]
        right = known_labels(fashion.CLASSES, ctx.labels)
        drawn = random.Random(f"classify {ctx.seed}").sample(range(len(labels)), len(labels))
        chosen = spread(drawn, lambda index: int(labels[index]))[: self.items]
        return [_item(f"test-{i}", fashion.FashionPicture(i), right.get(fashion.CLASSES[labels[i]])) for i in chosen]

    def grade(self, result: ItemResult) -> Grade:
        """The likeliest class against the right one; no judgement where none is known. The five likeliest are kept."""
        best = result.ranked[:SHOWN]
        data = {"labels": [name for name, _ in best], "probabilities": [p for _, p in best]}
        expected = result.item.expected
        if expected is None:
            return Grade(text=result.text, data=data)
        correct = result.text.strip().casefold() == expected.strip().casefold()
        return Grade(correct=correct, text=result.text, metrics={"accuracy": float(correct)}, data=data)


def _item(name: str, picture: Any, expected: str | None = None) -> Item:
    return Item(id=name, task="classify", chat=False, image=picture, expected=expected)


def label_of(image: Listed) -> str | None:
    """The label of a row, or the name of the subfolder that an image lies in; None where there is none.

    Raises:
        WorkloadError: the row's label is neither text nor a whole number.
    """
    if not image.source:
        folder, slash, _ = image.id.partition("/")
        return folder if slash else None
    label = image.cells.get("label")
    if label is None or isinstance(label, str):
        return (label or "").strip() or None
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label)
    raise WorkloadError(f"{image.source} has {type(label).__name__} in column 'label'; a label is text or the number of a class")


def _refuse_mixed(given: str, images: Sequence[Listed], labels: dict[str, str | None]) -> None:
    """A folder is either flat or sorted into subfolders; both at once would leave some images without a label unnoticed."""
    loose = [i.id for i in images if not i.source and labels[i.id] is None]
    if loose and len(loose) < len(images):
        raise WorkloadError(
            f"folder {given!r} holds images beside its subfolders ({loose[0]!r} and {len(loose) - 1} more); "
            "put every image into the subfolder of its label, or all into one folder without labels"
        )


def known_labels(given: Any, classes: Sequence[str]) -> dict[str | None, str]:
    """Label as given -> class of the model: by name, whatever the case, or else by number.

    Args:
        given: labels, None for unlabelled images.
        classes: the model's, in their order; without any, nothing is labelled.

    Raises:
        WorkloadError: labels that are no class of the model.
    """
    if not classes:
        return {}
    by_name = {name.strip().casefold(): name for name in reversed(classes)}  # of equal names the first one counts
    found: dict[str | None, str] = {}
    unknown: list[str] = []
    for label in dict.fromkeys(given):
        if label is None:
            continue
        name = by_name.get(label.casefold())
        if name is None and label.isdecimal() and len(label) < 10 and int(label) < len(classes):
            name = classes[int(label)]
        if name is None:
            unknown.append(label)
        else:
            found[label] = name
    if unknown:
        are = f"{len(unknown)} labels are no classes" if len(unknown) > 1 else "1 label is no class"
        raise WorkloadError(
            f"{are} of this model: {_first(unknown)}; its {len(classes)} classes are {_first(classes)}; rename the labels to "
            f"these, give the numbers of classes (0 to {len(classes) - 1}), or leave the labels out"
        )
    return found


def _first(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {more} more" if more > 0 else "")
