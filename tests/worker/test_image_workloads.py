"""Workloads about images: real files of every kind, scenes against a second evaluator, one sentence for every bad input."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from studio_state.errors import SpecError, WorkloadError
from studio_state.experiment import WorkloadSpec
from tests import tiny
from workers.data import fashion, photos, scenes
from workers.data.pictures import FilePicture
from workers.data.scenes import COLOURS, KINDS, Scene, ScenePicture, Thing, held_out_scene
from workers.workloads import image_tables
from workers.workloads.base import Item, ItemContext, ItemResult
from workers.workloads.classify import Classify
from workers.workloads.image_tables import spread
from workers.workloads.registry import make_workload
from workers.workloads.vqa import BLIND, OPEN_PROMPTS, VQA, first_word

CTX = ItemContext(None)
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def labelled(labels: tuple[str, ...], seed: int = 0) -> ItemContext:
    return ItemContext(None, seed, labels=labels)


def refused(act: Callable[[], Any]) -> str:
    """What a WorkloadError says: one sentence for a person."""
    with pytest.raises(WorkloadError) as error:
        act()
    text = str(error.value)
    assert text
    assert "\n" not in text
    assert not any(w in text for w in ("Traceback", "Error", " object at 0x"))
    return text


def image_file(path: Path, colour: tuple[int, int, int] = RED, size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


# ---------------------------------------------------------------- scenes


def name_of(thing: Thing) -> tuple[str, str]:
    return thing.colour, thing.shape


def evaluate(scene: Scene, text: str) -> str:
    """A second evaluator: the answer to a question's text from the scene's things alone."""
    at = {t.cell: t for t in scene.things}
    rows, columns = {"top": 0, "middle": 1, "bottom": 2}, {"left": 0, "center": 1, "right": 2}
    counted = ["zero", "one", "two", "three", "four", "five", "six"]
    if text == "how many objects are there ?":
        return counted[len(at)]
    if m := re.fullmatch(r"what (color|shape) is at the (\w+) (\w+) \?", text):
        thing = at.get((rows[m[2]], columns[m[3]]))
        return "nothing" if thing is None else thing.colour if m[1] == "color" else thing.shape
    if m := re.fullmatch(r"how many (\w+) are there \?", text):
        singular = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}[m[1]]
        return counted[len([1 for t in scene.things if t.shape == singular])]
    if m := re.fullmatch(r"is there a (\w+) (\w+) \?", text):
        return "yes" if (m[1], m[2]) in {name_of(t) for t in scene.things} else "no"
    m = re.fullmatch(r"is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+) \?", text)
    assert m, text
    a, b = ([t for t in scene.things if name_of(t) == (m[i], m[i + 1])] for i in (1, 4))
    if not a or not b:
        return "no"
    assert len(a) == len(b) == 1, f"{text}: ambiguous"
    (row_a, column_a), (row_b, column_b) = a[0].cell, b[0].cell
    answer = {
        "left of": column_a < column_b,
        "right of": column_a > column_b,
        "above": row_a < row_b,
        "below": row_a > row_b,
    }[m[3]]
    return "yes" if answer else "no"


@pytest.mark.parametrize("size", [96, 192])
def test_every_answer_about_a_scene_is_right(size: int) -> None:
    items = VQA(items=1200, scene_size=size).make_items(CTX)
    assert len(items) == 1200
    by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for item in items:
        assert isinstance(item.image, ScenePicture)
        assert evaluate(item.image.scene, item.prompt) == item.expected, item.id
        by_kind[item.data["kind"]][str(item.expected)] += 1
        assert set(item.prompt.split()) | {item.expected} <= set(scenes.WORDS), "not a word of the studio's own models"
        assert (item.task, item.chat, item.max_new_tokens) == ("generate", True, 4)
    assert all(sum(c.values()) == 200 for c in by_kind.values())
    for kind in ("exists", "relation"):
        assert set(by_kind[kind]) == {"yes", "no"}
    assert "nothing" in by_kind["colour-at"]
    assert "zero" in by_kind["count-of-shape"]


def test_each_scene_is_asked_every_kind_in_turn() -> None:
    items = VQA(items=14).make_items(CTX)
    assert [i.id for i in items] == [f"scene-{n}-{kind}" for n in range(3) for kind in KINDS][:14]
    assert all(items[i].image == items[0].image for i in range(6))
    assert items[6].image != items[0].image


def test_items_depend_on_nothing_but_the_options() -> None:
    items = VQA(items=30).make_items(CTX)
    assert items == VQA(items=30).make_items(ItemContext(None, seed=9)), "held-out scenes are the same for everybody"
    assert VQA(items=7).make_items(CTX) == items[:7]
    two = VQA(items=6, kinds=" relation, count,count ").make_items(CTX)
    assert [i.id for i in two] == [f"scene-{n}-{kind}" for n in range(3) for kind in ("count", "relation")]
    assert two[:2] == [i for i in items[:6] if i.data["kind"] in ("count", "relation")]
    assert {i.image.scene.size for i in VQA(items=6, scene_size=192).make_items(CTX) if isinstance(i.image, ScenePicture)} == {
        192
    }


def test_scenes_are_those_that_the_recipes_score_and_never_train_on() -> None:
    from workers.training.scene_scores import held_out

    pairs = held_out(96, 3)
    items = VQA(items=18).make_items(CTX)
    assert [(i.prompt, i.expected) for i in items] == [(q.text, q.answer) for _, q in pairs]
    assert scenes.HELD_OUT_SEED == 20_250_101


@pytest.mark.parametrize("size", [96, 192])
def test_the_image_of_a_scene_is_its_masks(size: int) -> None:
    for n in range(40):
        scene, _ = held_out_scene(size, n)
        pixels = np.asarray(ScenePicture(scene).open())
        assert pixels.shape == (size, size, 3)
        assert scene.masks.shape == (len(scene.things), size, size)
        assert scene.masks.sum(0).max() == 1, "objects overlap"
        cell = size / 3
        for thing, mask in zip(scene.things, scene.masks, strict=True):
            assert (pixels[mask] == COLOURS[thing.colour]).all()
            ys, xs = mask.nonzero()
            row, column = thing.cell
            assert row * cell <= ys.min() <= ys.max() < (row + 1) * cell
            assert column * cell <= xs.min() <= xs.max() < (column + 1) * cell
            share = mask.sum() / ((ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1))
            low, high = {"circle": (0.7, 0.86), "square": (0.99, 1), "triangle": (0.4, 0.62), "cross": (0.45, 0.68)}[thing.shape]
            assert low <= share <= high, (thing, share)  # how much of its box a shape fills
        assert (pixels[~scene.masks.any(0)] == scene.ground).all()


@pytest.mark.parametrize("size", [96, 192])
def test_what_a_blind_model_scores_is_what_the_card_says(size: int) -> None:
    items = VQA(items=300 * len(KINDS), scene_size=size).make_items(CTX)
    answers = {kind: Counter(i.expected for i in items if i.data["kind"] == kind) for kind in KINDS}
    guessed = {kind: found.most_common(1)[0][0] for kind, found in answers.items()}
    workload = VQA()
    right = [workload.grade(ItemResult(i, text=str(guessed[i.data["kind"]]))).correct for i in items]
    assert BLIND[size] == round(sum(map(bool, right)) / len(items), 2)
    assert f"{100 * BLIND[size]:.0f} %" in VQA.card.detects
    assert VQA.card.chance == BLIND[VQA().scene_size]


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("three", True),
        (" Three.", True),
        ("**three** objects", True),
        ("three three three three", True),
        ("_three_", True),
        ("there are three", False),
        ("thirty-three", False),
        ("two", False),
        ("", False),
        ("...", False),
    ],
)
def test_answers_about_scenes_by_hand(text: str, correct: bool) -> None:
    item = Item("s", expected="three", data={"kind": "count", "answers": ["three"]})
    grade = VQA().grade(ItemResult(item, text=text))
    assert (grade.correct, grade.text, grade.metrics) == (correct, text, {"accuracy": float(correct)})
    assert grade.data == {"kind": "count"}


def test_first_words() -> None:
    assert [first_word(t) for t in ("Yes, it is", "\n no", "!?", "")] == ["yes", "no", "", ""]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"kinds": "color-at"}, "there is no kind of question 'color-at'; did you mean 'colour-at'? allowed: count, "),
        ({"kinds": "count,weather"}, "there is no kind of question 'weather'; allowed: count, "),
        ({"kinds": " , "}, "kinds is empty; name at least one of count, "),
        ({"kinds": ""}, "kinds is empty"),
    ],
)
def test_kinds_that_are_none(options: dict[str, Any], part: str) -> None:
    assert part in refused(lambda: VQA(**options).make_items(CTX))


def test_options_are_bounded_and_a_path_is_marked_as_one() -> None:
    for options, part in (({"scene_size": 128}, "allowed: 96, 192"), ({"items": 0}, "a whole number from 1 to")):
        with pytest.raises(SpecError, match=part):
            make_workload(WorkloadSpec(id="vqa", options=options))
    for kind in (VQA, Classify):
        source = kind.describe().options["properties"]["source"]
        assert source["format"] == "path", "visitors of a public studio could open files of its host"
        assert source["default"] in source["examples"]


# ---------------------------------------------------------------- photographs of packages


def test_photographs_of_packages() -> None:
    items = VQA(source="photos").make_items(CTX)
    found = photos.package_photos()
    assert len(items) == len(found) * len(OPEN_PROMPTS)
    assert len({i.id for i in items}) == len(items)
    assert items[0].id == "cheetah1-describe"
    assert [i.data["kind"] for i in items[: len(found) + 1]] == ["describe"] * len(found) + ["foreground"]
    assert all(i.expected is None and i.max_new_tokens == 48 and i.chat for i in items)
    assert all(i.image and min(i.image.open().size) >= 200 for i in items[: len(found)])
    assert VQA(source="photos", items=3).make_items(CTX) == items[:3]
    grade = VQA(source="photos").grade(ItemResult(items[0], text="A cheetah."))
    assert (grade.correct, grade.text, grade.metrics, grade.data) == (None, "A cheetah.", {}, {"kind": "describe"})
    shown_classes = Classify(source="photos").make_items(labelled(("cat", "dog")))
    assert [(i.id, i.expected, i.task) for i in shown_classes] == [(p.stem, None, "classify") for p in found]


def test_packages_are_looked_up_and_never_imported() -> None:
    code = (
        "import sys; from workers.data.photos import package_photos; package_photos()\n"
        "print({'gradio', 'skimage', 'sklearn'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_without_any_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "PLACES", (("no_such_package", "x", ("a.jpg",)), ("json", "nowhere", ("b.jpg",))))
    for kind in (VQA, Classify):
        said = refused(lambda kind=kind: kind(source="photos").make_items(CTX))  # type: ignore[misc]
        assert "no installed package brings photographs (no_such_package, json were looked at); give a folder" in said


# ---------------------------------------------------------------- questions in files


def test_every_image_of_a_folder_is_asked_one_question(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/c.webp", ".hidden.png", ".thumbs/d.png", "__MACOSX/e.png"):
        image_file(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image, and not meant as one")
    items = VQA(source=str(tmp_path), question="Red?").make_items(CTX)
    assert [(i.id, i.prompt, i.expected) for i in items] == [(n, "Red?", None) for n in ("a.JPG", "b.png", "deep/c.webp")]
    assert items[2].image == FilePicture(tmp_path / "deep/c.webp")
    assert [i.id for i in VQA(source=str(tmp_path), items=2).make_items(CTX)] == ["a.JPG", "b.png"]
    (one,) = VQA(source=str(tmp_path / "b.png")).make_items(CTX)
    assert (one.id, one.prompt) == ("b.png", "What is in this picture?")


@pytest.mark.parametrize("name", ["q.jsonl", "q.csv", "q.tsv"])
def test_questions_of_a_table(name: str, tmp_path: Path) -> None:
    absolute = image_file(tmp_path / "elsewhere" / "b.png")
    image_file(tmp_path / "data" / "pictures" / "a.png")
    rows: list[list[Any]] = [["pictures/a.png", "What color?", "red|crimson"], [str(absolute), "How many?", ""]]
    path = tmp_path / "data" / name
    if name == "q.jsonl":
        rows += [["pictures/a.png", "Which?", ["Blue", 4]], ["pictures/a.png", "Number?", 7], ["pictures/a.png", "None?", None]]
        path.write_text("\n".join(json.dumps(dict(zip(("image", "question", "answer"), r, strict=True))) for r in rows))
    else:
        mark = "," if name == "q.csv" else "\t"
        path.write_text("\n".join(mark.join(r) for r in [["image", "question", "answer"], *rows]))
    items = VQA(source=str(path)).make_items(CTX)
    first = 1 if name == "q.jsonl" else 2
    assert [i.id for i in items] == [f"line-{first + n}" for n in range(len(rows))]
    assert [i.prompt for i in items] == [r[1] for r in rows]
    assert [i.expected for i in items] == ["red | crimson", None, "Blue | 4", "7", None][: len(rows)]
    assert items[0].image == FilePicture(tmp_path / "data/pictures/a.png")
    assert items[1].image == FilePicture(absolute)
    workload = VQA()
    for text, correct in (("It is CRIMSON.", True), ("red", True), ("reddish", False), ("", False)):
        grade = workload.grade(ItemResult(items[0], text=text))
        assert (grade.correct, grade.metrics, grade.data) == (correct, {"accuracy": float(correct)}, {"kind": "file"})
    assert workload.grade(ItemResult(items[1], text="four")).correct is None
    assert VQA(source=str(path), items=1).make_items(CTX) == items[:1]


TABLES: list[tuple[str, str, str]] = [
    ("q.csv", "question,answer\na,b\n", "has no column 'image'; columns found: question, answer"),
    ("q.csv", "image,prompt\na.png,b\n", "has no column 'question'; columns found: image, prompt"),
    ("q.csv", "image,question,answers\na.png,b,c\n", "has a column 'answers' that is not read; did you mean 'answer'? rename"),
    ("q.csv", "image,question\na.png,b\nno.png,c\n", "line 3 of "),
    ("q.csv", "image,question\nno.png,c\n", "no.png' is not there"),
    ("q.csv", "image,question\n,c\n", "line 2 of "),
    ("q.csv", "image,question\na.png,\n", "has no text in column 'question'"),
    ("q.csv", "image,question\nbad.jpg,c\n", "is not an image that can be read"),
    ("q.csv", "image,question\n", "has a header but no rows"),
    ("q.jsonl", '{"image": 5, "question": "a"}', "has no text in column 'image'"),
    ("q.jsonl", '{"image": "a.png", "question": 5}', "has no text in column 'question'"),
    ("q.jsonl", '{"image": "a.png", "question": "a\\u0000b"}', "is binary, not text"),
    ("q.jsonl", '{"image": "a.png\\u0000", "question": "b"}', "is not there"),
    ("q.jsonl", '{"image": "a\\nb.png", "question": "b"}', "is not there"),
    ("q.jsonl", '{"image": "a.png", "question": "b", "answer": {"x": 1}}', "has dict in column 'answer'"),
    ("q.jsonl", '{"image": "a.png", "question": "b", "answer": [["x"]]}', "has list in column 'answer'"),
    ("q.jsonl", '{"image": "a.png", "question": "b", "answer": true}', "has bool in column 'answer'"),
    ("q.jsonl", '{"image": "a.png"', "is not JSON"),
    ("q.txt", "a.png\n", "is neither a folder nor an image"),
]


@pytest.mark.parametrize(("name", "content", "part"), TABLES)
def test_unusable_tables_are_refused(name: str, content: str, part: str, tmp_path: Path) -> None:
    image_file(tmp_path / "a.png")
    (tmp_path / "bad.jpg").write_text("text")
    (tmp_path / name).write_text(content)
    assert part in refused(lambda: VQA(source=str(tmp_path / name)).make_items(CTX))


@pytest.mark.parametrize("kind", [VQA, Classify])
@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("photo", "there is no file or folder 'photo'; did you mean 'photos'? give "),
        ("no/such/folder", "there is no file or folder 'no/such/folder'; give "),
        ("no.csv", "there is no file or folder 'no.csv'"),
        (" ", "the source is empty; give "),
        ("a\x00b", "'a\\x00b'"),
        ("a" * 300, "is not a path (File name too long)"),
        ("~nobody-of-this-name/x", "is not a path"),
    ],
)
def test_sources_that_are_not_there(kind: type[VQA] | type[Classify], source: str, part: str) -> None:
    assert part in refused(lambda: kind(source=source).make_items(CTX))


@pytest.mark.parametrize("kind", [VQA, Classify])
def test_unusable_folders_are_refused(kind: type[VQA] | type[Classify], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = kind(source=str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    assert "holds no images; give one with .jpg, " in refused(lambda: workload.make_items(CTX))
    image_file(tmp_path / "a.png")
    (tmp_path / "z.jpg").write_text("a text that was renamed")
    assert "z.jpg' is not an image that can be read" in refused(lambda: workload.make_items(CTX))
    monkeypatch.setattr(image_tables, "MOST_FILES", 2)
    assert "holds more than 2 files; give a smaller one" in refused(lambda: workload.make_items(CTX))


def test_an_empty_or_endless_question(tmp_path: Path) -> None:
    image_file(tmp_path / "a.png")
    for empty in ("", " \n"):
        said = refused(lambda empty=empty: VQA(source=str(tmp_path), question=empty).make_items(CTX))  # type: ignore[misc]
        assert said == "the question is empty; write what is to be asked"
    long = VQA(source=str(tmp_path), question="why " * 900)
    context = ItemContext(tiny.tokenizer(), context=512)
    assert "the question of a.png needs " in refused(lambda: long.make_items(context))
    assert len(VQA(source=str(tmp_path)).make_items(context)) == 1


def images_held() -> int:
    gc.collect()
    return sum(issubclass(type(o), Image.Image) for o in gc.get_objects())  # asking torch for its class warns


def test_items_hold_no_pixels(tmp_path: Path) -> None:
    for n in range(50):
        image_file(tmp_path / f"{n}.jpg", size=(400, 300))
    lines = [json.dumps({"image": f"{n % 50}.jpg", "question": "x"}) for n in range(500)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    before = images_held()
    many = VQA(source=str(tmp_path / "q.jsonl"), items=500).make_items(CTX)
    many += VQA(items=120).make_items(CTX)
    many += Classify(items=50).make_items(CTX)
    many += Classify(source=str(tmp_path)).make_items(CTX)
    assert images_held() == before
    for item in many:
        assert item.image
        item.image.open()
    assert images_held() == before, "an item keeps its image once it was opened"


# ---------------------------------------------------------------- classify


def test_fashion_is_spread_over_its_classes() -> None:
    images, labels = fashion.held_out()
    items = Classify().make_items(labelled(fashion.CLASSES))
    assert len(items) == 200
    assert Counter(i.expected for i in items) == dict.fromkeys(fashion.CLASSES, 20)
    for item in items:
        index = int(item.id.removeprefix("test-"))
        assert item.expected == fashion.CLASSES[labels[index]]
        assert (item.task, item.prompt) == ("classify", "")
        assert item.image
        opened = np.asarray(item.image.open())
        assert opened.shape == (28, 28, 3)
        assert (opened == images[index][..., None]).all()
    assert items == Classify().make_items(labelled(fashion.CLASSES))
    assert Classify(items=13).make_items(labelled(fashion.CLASSES)) == items[:13]
    other = Classify().make_items(labelled(fashion.CLASSES, seed=1))
    assert len({i.id for i in items} & {i.id for i in other}) < 30
    everything = Classify(items=10_000).make_items(labelled(fashion.CLASSES))
    assert len({i.id for i in everything}) == 10_000


def test_a_model_without_classes_runs_unlabelled(tmp_path: Path) -> None:
    assert all(i.expected is None for i in Classify(items=20).make_items(CTX))
    image_file(tmp_path / "cat" / "a.png")
    assert [i.expected for i in Classify(source=str(tmp_path)).make_items(CTX)] == [None]


def test_subfolders_are_labels(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.png", "cat/3.png", "DOG/1.png", "DOG/more/2.png"):
        image_file(tmp_path / name)
    items = Classify(source=str(tmp_path)).make_items(labelled(("Cat", "dog", "owl")))
    assert Counter(i.expected for i in items) == {"Cat": 3, "dog": 2}
    assert len({i.expected for i in items[:2]}) == 2, "the beginning holds every label"
    assert {i.id for i in items} == {"cat/1.png", "cat/2.png", "cat/3.png", "DOG/1.png", "DOG/more/2.png"}
    assert items == Classify(source=str(tmp_path)).make_items(labelled(("Cat", "dog", "owl")))
    image_file(tmp_path / "loose.png")
    said = refused(lambda: Classify(source=str(tmp_path)).make_items(labelled(("cat", "dog"))))
    assert "holds images beside its subfolders ('loose.png' and 0 more)" in said


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        image_file(tmp_path / name)
    items = Classify(source=str(tmp_path)).make_items(labelled(("cat", "dog"), seed=5))
    assert [(i.id, i.expected) for i in items] == [("a.png", None), ("b.png", None)]


def test_labels_of_a_table_by_name_or_number(tmp_path: Path) -> None:
    image_file(tmp_path / "a.png")
    (tmp_path / "q.csv").write_text("image,label\na.png, CAT \na.png,1\na.png,\n")
    items = Classify(source=str(tmp_path / "q.csv")).make_items(labelled(("cat", "dog")))
    assert [(i.id, i.expected) for i in items] == [("line-2", "cat"), ("line-3", "dog"), ("line-4", None)]
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "label": 0}\n{"image": "a.png", "label": "dog"}\n{"image": "a.png"}')
    items = Classify(source=str(tmp_path / "q.jsonl")).make_items(labelled(("cat", "dog")))
    assert [i.expected for i in items] == ["cat", "dog", None]
    (tmp_path / "q.csv").write_text("image,label\na.png,1\n")  # a class whose name is a number goes before the number
    assert Classify(source=str(tmp_path / "q.csv")).make_items(labelled(("1", "0")))[0].expected == "1"
    (tmp_path / "plain.csv").write_text("image,note\na.png,x\n")
    assert Classify(source=str(tmp_path / "plain.csv")).make_items(labelled(("1", "0")))[0].expected is None


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (
            "image,label\na.png,cow\na.png,cat\na.png,cow\n",
            "1 label is no class of this model: 'cow'; its 2 classes are 'cat', 'dog'; rename the labels to these, "
            "give the numbers of classes (0 to 1), or leave the labels out",
        ),
        (
            "image,label\n" + "".join(f"a.png,x{n}\n" for n in range(7)),
            "7 labels are no classes of this model: 'x0', 'x1', 'x2', 'x3', 'x4' and 2 more; its 2 classes are",
        ),
        ("image,label\na.png,2\n", "1 label is no class of this model: '2'"),
        ("image,label\na.png,-1\n", "1 label is no class of this model: '-1'"),
        ("image,label\na.png,²\n", "1 label is no class of this model: '²'"),
        ("image,labels\na.png,cat\n", "has a column 'labels' that is not read; did you mean 'label'?"),
        ("label\ncat\n", "has no column 'image'; columns found: label"),
        ("image,label\nno.png,cat\n", "line 2 of "),
        ("image,label\nbad.jpg,cat\n", "bad.jpg' is not an image that can be read"),
    ],
)
def test_unusable_labels_are_refused(content: str, part: str, tmp_path: Path) -> None:
    image_file(tmp_path / "a.png")
    (tmp_path / "bad.jpg").write_text("text")
    (tmp_path / "q.csv").write_text(content)
    assert part in refused(lambda: Classify(source=str(tmp_path / "q.csv")).make_items(labelled(("cat", "dog"))))


def test_other_unusable_labels(tmp_path: Path) -> None:
    image_file(tmp_path / "a.png")
    for label, kind in (("1.5", "float"), ("true", "bool"), ('["cat"]', "list")):
        (tmp_path / "q.jsonl").write_text(f'{{"image": "a.png", "label": {label}}}')
        said = refused(lambda: Classify(source=str(tmp_path / "q.jsonl")).make_items(labelled(("cat",))))
        assert f"has {kind} in column 'label'; a label is text or the number of a class" in said
    said = refused(lambda: Classify().make_items(labelled(tuple(f"class {n}" for n in range(1000)))))
    assert "10 labels are no classes of this model: 'T-shirt', " in said
    assert "'class 4' and 995 more" in said


def test_classes_by_hand() -> None:
    ranked = [(name, 0.3 - 0.05 * n) for n, name in enumerate(("cat", "dog", "owl", "elk", "bat", "ant"))]
    workload = Classify()
    for text, expected, correct in (("Cat ", "cat", True), ("cat", "dog", False), ("", "dog", False)):
        grade = workload.grade(ItemResult(Item("i", task="classify", expected=expected), text=text, ranked=ranked))
        assert (grade.correct, grade.text, grade.metrics) == (correct, text, {"accuracy": float(correct)})
        assert grade.data["labels"] == ["cat", "dog", "owl", "elk", "bat"]
        assert grade.data["probabilities"] == pytest.approx([0.3, 0.25, 0.2, 0.15, 0.1])
    grade = workload.grade(ItemResult(Item("i", task="classify"), text="cat", ranked=ranked))
    assert (grade.correct, grade.metrics) == (None, {})
    grade = workload.grade(ItemResult(Item("i", task="classify")))  # only features
    assert (grade.correct, grade.data) == (None, {"labels": [], "probabilities": []})


def test_every_beginning_is_spread() -> None:
    assert spread(["a1", "a2", "a3", "b1", "c1", "c2"], lambda x: x[0]) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert spread([], str) == []
