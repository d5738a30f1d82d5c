"""Workloads: exact token counts, deterministic items, hand-worked grades, and one sentence for every bad input."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

import workers.workloads
from studio_state.catalog import asset
from studio_state.errors import SpecError, WorkloadError
from studio_state.experiment import WorkloadSpec
from studio_state.metrics import METRICS
from studio_state.problems import schema_problems
from tests import tiny
from workers.models.zoo import fetch
from workers.workloads.base import Item, ItemContext, ItemResult, Workload
from workers.workloads.detects import fewest_changes, smallest_shift
from workers.workloads.multiple_choice import MultipleChoice, choosable
from workers.workloads.needle import Needle
from workers.workloads.perplexity import Perplexity
from workers.workloads.prompts import Prompts
from workers.workloads.registry import make_workload, workload_classes
from workers.workloads.speed import Speed
from workers.workloads.texts import novel, novel_sentences, passage, split_sentences
from workers.workloads.tokens import prefix_ids, split_at_boundary, template_tokens

CONTEXT = 8192
IDS = ["classify", "generate-images", "multiple-choice", "needle", "perplexity", "prompts", "speed", "vqa", "vqa-clips"]
FAMILIES = {"classify": ("vit",), "generate-images": ("diffusion",), "vqa": ("vlm",), "vqa-clips": ("vlm",)}


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The demo model's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fetch("smollm2-135m"), local_files_only=True)


@pytest.fixture(scope="session")
def with_bos() -> Any:
    """The tiny tokenizer, made to put a begin-of-sequence token before every text, as Llama's does."""
    raw = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|im_start|>", clean_up_tokenization_spaces=False)


def context(tokenizer: Any, seed: int = 0, longest: int = CONTEXT) -> ItemContext:
    return ItemContext(tokenizer, seed, longest)


def count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def sentence_of(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


# ---------------------------------------------------------------- the packaged novel


def test_novel_is_the_file_its_readme_describes() -> None:
    readme = asset("workloads/README.md").read_text(encoding="utf-8")
    packed = asset("workloads/pride-and-prejudice.txt.gz").read_bytes()
    assert hashlib.sha256(packed).hexdigest() in readme
    assert hashlib.sha256(novel().encode()).hexdigest() in readme
    assert packed[4:8] == b"\0\0\0\0"  # RFC 1952: modification time
    assert not packed[3] & 8  # RFC 1952: no file name


def test_novel_is_whole_and_clean() -> None:
    paragraphs = novel().strip("\n").split("\n\n")
    assert [p for p in paragraphs if p.startswith("Chapter ")] == [f"Chapter {i}" for i in range(1, 62)]
    assert (
        paragraphs[1]
        == "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife."
    )
    assert paragraphs[-1].endswith("had been the means of uniting them.")
    assert not any("\n" in p or "  " in p.strip() or "_" in p or "*" in p for p in paragraphs)


def test_sentences_end_at_sentences_and_not_at_titles() -> None:
    text = 'Mr. Bennet saw Mrs. F. at St. Ives. "Is it so?" cried Jane. "It is I. You knew!" He left. etc. and so on.'
    assert split_sentences(text) == [
        "Mr. Bennet saw Mrs. F. at St. Ives.",
        '"Is it so?" cried Jane.',
        '"It is I.',
        'You knew!"',
        "He left. etc. and so on.",
    ]


def test_sentences_put_together_are_the_novel() -> None:
    first_of_chapter_2 = next(s.index for s in novel_sentences() if s.chapter == 2)
    chapter_1 = novel().split("Chapter 1\n\n")[1].split("\n\nChapter 2\n\n")[0]
    assert passage(0, first_of_chapter_2) == chapter_1


# ---------------------------------------------------------------- all workloads


def test_registry_finds_every_workload_and_its_card_is_complete() -> None:
    classes = workload_classes()
    assert list(classes) == IDS
    for kind in classes.values():
        card = kind.describe()
        assert card.summary
        assert card.title
        assert card.families == FAMILIES.get(card.id, ("llm", "vlm"))
        assert "items" in card.defaults()
        assert all(p.get("description") for p in card.options["properties"].values())
        assert set(card.metrics) <= set(METRICS)
        assert str(card.defaults()["items"]) in card.detects or card.id == "prompts"
        assert not schema_problems(card.defaults(), card.options, card.id)


def test_a_workload_module_that_cannot_be_imported_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.setattr(workers.workloads, "__path__", [*workers.workloads.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    workload_classes.cache_clear()
    with pytest.raises(ImportError, match="no_such_module_anywhere"):
        workload_classes()


def test_two_workloads_with_one_id_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zz_twin.py").write_text("from workers.workloads.speed import Speed\nclass Twin(Speed):\n    pass\n")
    monkeypatch.setattr(workers.workloads, "__path__", [*workers.workloads.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    workload_classes.cache_clear()
    with pytest.raises(TypeError, match="'speed' is declared by"):
        workload_classes()
    sys.modules.pop("workers.workloads.zz_twin", None)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (WorkloadSpec(id="needles"), "did you mean 'needle'"),
        (WorkloadSpec(id="needle", options={"depht": 1}), "no option 'depht'; did you mean 'depth'"),
        (WorkloadSpec(id="needle", options={"depth": 1.5}), "depth = 1.5 is not allowed; allowed: a number from 0 to 1"),
        (WorkloadSpec(id="needle", options={"length": 63}), "a whole number from 64 to"),
        (WorkloadSpec(id="multiple-choice", options={"choices": 1}), "a whole number from 2 to 8"),
        (WorkloadSpec(id="speed", options={"items": "5"}), "items = '5' is not allowed"),
    ],
)
def test_refused_options_are_one_sentence(spec: WorkloadSpec, part: str) -> None:
    with pytest.raises(SpecError) as error:
        make_workload(spec)
    assert part in sentence_of(error)


def test_make_workload_sets_the_options() -> None:
    assert make_workload(WorkloadSpec(id="needle", options={"depth": 1, "items": 2})) == Needle(depth=1.0, items=2)


@pytest.mark.parametrize(
    "workload", [Needle(items=3), MultipleChoice(items=5), Perplexity(items=2, context=64, score=8), Prompts(), Speed()]
)
def test_items_are_the_same_for_the_same_seed(workload: Workload, smollm2: Any) -> None:
    first, again = (workload.make_items(context(smollm2, seed=3)) for _ in range(2))
    assert first == again
    assert len({i.id for i in first}) == len(first)


@pytest.mark.parametrize("workload", [Needle(items=3), MultipleChoice(items=5)])
def test_generated_items_differ_between_seeds(workload: Workload, smollm2: Any) -> None:
    one, other = (workload.make_items(context(smollm2, seed=s)) for s in (1, 2))
    assert not {i.prompt for i in one} & {i.prompt for i in other}


@pytest.mark.parametrize("workload", [Perplexity(items=2, context=64, score=8), Speed()])
def test_fixed_texts_do_not_depend_on_the_seed(workload: Workload, smollm2: Any) -> None:
    assert workload.make_items(context(smollm2, seed=1)) == workload.make_items(context(smollm2, seed=2))


# ---------------------------------------------------------------- perplexity


def test_windows_have_the_exact_lengths_and_are_the_text(smollm2: Any) -> None:
    text_ids = smollm2(novel(), add_special_tokens=False)["input_ids"]
    items = Perplexity(items=6, context=100, score=20).make_items(context(smollm2))
    starts = [item.data["start"] for item in items]
    assert starts[0] == 0
    assert starts[-1] == len(text_ids) - 120  # the last window ends with the text
    for start, item in zip(starts, items, strict=True):
        assert item.task == "score"
        assert item.chat is False
        assert list(item.prompt_ids) == text_ids[start : start + 100]
        assert [list(c) for c in item.continuation_ids] == [text_ids[start + 100 : start + 120]]
    gaps = [b - a for a, b in pairwise(starts)]
    assert max(gaps) - min(gaps) <= 1


def test_the_tokenizers_prefix_counts_to_the_context(with_bos: Any) -> None:
    assert prefix_ids(with_bos) == [1]
    assert prefix_ids(tiny.tokenizer()) == []
    item = Perplexity(items=1, context=32, score=4).make_items(context(with_bos))[0]
    assert len(item.prompt_ids) == 32
    assert item.prompt_ids[0] == 1
    assert 1 not in item.prompt_ids[1:] + item.continuation_ids[0]


def test_as_many_windows_as_fit_never_score_a_token_twice(tmp_path: Path, smollm2: Any) -> None:
    file = tmp_path / "short.txt"
    file.write_text(passage(0, 60))
    tokens = count(smollm2, file.read_text())
    most = (tokens - 48) // 16 + 1  # windows of 32 + 16: the first needs 48, every other at least 16 more
    workload = Perplexity(items=most, context=32, score=16, file=str(file))
    scored = [set(range(i.data["scored_from"], i.data["scored_from"] + 16)) for i in workload.make_items(context(smollm2))]
    assert len(scored) == most
    assert sum(map(len, scored)) == len(set().union(*scored))
    assert max(set().union(*scored)) == tokens - 1
    with pytest.raises(WorkloadError) as error:
        workload.model_copy(update={"items": most + 1}).make_items(context(smollm2))
    assert f"has {tokens:,} tokens" in sentence_of(error)
    assert f"at most {most} items fit" in sentence_of(error)


def test_perplexity_by_hand() -> None:
    a = ItemResult(Item("a", task="score"), nll=[[1.0, 3.0]])
    b = ItemResult(Item("b", task="score"), nll=[[2.0]])
    workload = Perplexity()
    assert workload.grade(a).metrics == {"nll": 2.0}
    assert workload.grade(a).correct is None
    assert workload.summarize([a, b]) == {"perplexity": pytest.approx(7.38905609893065)}  # e^2, all tokens alike
    uniform = ItemResult(Item("u"), nll=[[math.log(49152)] * 10])
    assert workload.summarize([uniform]) == {"perplexity": pytest.approx(49152)}
    assert workload.summarize([ItemResult(Item("x"), nll=[[5000.0]])]) == {"perplexity": math.inf}
    assert workload.summarize([]) == {}


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("missing.txt", None, "there is no file"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n\t", "is empty"),
        ("latin.txt", "Caf\u00e9".encode("latin-1"), "is not UTF-8 text (byte 3"),
        ("binary.txt", b"GGUF\x03\x00\x00\x00", "is binary, not text"),
        ("short.txt", b"Much too short.", "not even one item fits"),
    ],
)
def test_unusable_text_files_are_refused(name: str, content: bytes | None, part: str, tmp_path: Path, smollm2: Any) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WorkloadError) as error:
        Perplexity(file=str(tmp_path / name)).make_items(context(smollm2))
    assert part in sentence_of(error)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/", "is not a file"),
        ("a" * 300, "cannot be read"),
        ("a\x00b", "there is no file"),
        ("~nobody-of-this-name/x", "is not a path"),
    ],
)
def test_what_is_no_file_is_refused(path: str, part: str, smollm2: Any) -> None:
    with pytest.raises(WorkloadError) as error:
        Perplexity(file=path).make_items(context(smollm2))
    assert part in sentence_of(error)


@pytest.mark.parametrize(
    ("workload", "part"),
    [
        (Perplexity(context=2000, score=64), "needs 2,064 tokens, but the model's context is 2,048"),
        (Speed(prompt_tokens=2048, new_tokens=1), "needs 2,049 tokens"),
        (Needle(length=2048), "set length to at most"),
        (MultipleChoice(context=150, items=3), "lower context"),
    ],
)
def test_longer_than_the_models_context_is_refused(workload: Workload, part: str, smollm2: Any) -> None:
    with pytest.raises(WorkloadError) as error:
        workload.make_items(context(smollm2, longest=2048))
    assert part in sentence_of(error)


# ---------------------------------------------------------------- needle


@pytest.mark.parametrize("length", [64, 200, 512, 1800])
def test_needle_prompts_have_the_length_asked_for(length: int, smollm2: Any) -> None:
    for item in Needle(items=5, length=length).make_items(context(smollm2)):
        tokens = count(smollm2, item.prompt)
        assert length - 6 <= tokens <= length
        assert item.data["prompt_tokens"] == tokens
        assert item.chat


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_needle_lies_where_it_was_asked_for(depth: float, smollm2: Any) -> None:
    for item in Needle(items=4, length=1500, depth=depth).make_items(context(smollm2)):
        needle = f"The secret number for {item.data['city']} is {item.expected}."
        start, end = item.data["needle_span"]
        assert item.prompt[start:end] == needle
        assert item.prompt.count(needle) == 1
        before, after = item.prompt.split(needle)
        intro, hay_before = before.split("\n\n", 1)
        hay_after, question = after.split("\n\n", 1)
        assert question == f"What is the secret number for {item.data['city']}? Answer with the number."
        share = len(hay_before) / (len(hay_before) + len(hay_after))
        assert abs(share - depth) <= 0.06  # a sentence boundary: half of a long sentence away at most
        assert item.data["depth_found"] == pytest.approx(share, abs=0.01)
        assert not hay_before or hay_before.rstrip().endswith((".", "!", "?", '"', "'", ")"))
        assert item.expected not in intro + hay_before + hay_after
        assert item.data["city"] not in intro + hay_before + hay_after


def test_depths_are_spread_evenly_where_none_is_given(smollm2: Any) -> None:
    items = Needle(items=5, length=1500).make_items(context(smollm2))
    assert [i.data["depth"] for i in items] == [0, 0.25, 0.5, 0.75, 1]
    assert [round(i.data["depth_found"], 1) for i in items] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.06)


def test_the_longest_needle_that_fits_the_context_is_accepted(smollm2: Any) -> None:
    longest = 2048 - template_tokens(smollm2) - 16
    item = Needle(items=1, length=longest).make_items(context(smollm2, longest=2048))[0]
    chat = smollm2.apply_chat_template([{"role": "user", "content": item.prompt}], add_generation_prompt=True, tokenize=False)
    assert count(smollm2, chat) + item.max_new_tokens <= 2048
    with pytest.raises(WorkloadError, match=f"set length to at most {longest}"):
        Needle(items=1, length=longest + 1).make_items(context(smollm2, longest=2048))


def test_a_length_without_room_for_the_needle_is_refused() -> None:
    with pytest.raises(WorkloadError, match="length=64 has no room for a passage"):
        Needle(length=64).make_items(context(tiny.tokenizer()))


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("4821", True),
        ("The secret number for Oslo is 4821.", True),
        ("**4,821**", True),
        ("1. The number is 4821", True),
        ("It is 4822, not 4821.", False),
        ("48210", False),
        ("14821", False),
        ("482", False),
        ("four thousand eight hundred and twenty-one", False),
        ("", False),
    ],
)
def test_needle_answers_by_hand(text: str, correct: bool) -> None:
    grade = Needle().grade(ItemResult(Item("n", expected="4821"), text=text))
    assert grade.correct is correct
    assert grade.metrics == {"accuracy": 1.0 if correct else 0.0}


# ---------------------------------------------------------------- multiple choice


def test_there_are_enough_questions_and_fewer_are_a_beginning_of_more(smollm2: Any) -> None:
    many = MultipleChoice(items=200).make_items(context(smollm2))
    assert len({i.id for i in many}) == 200
    assert MultipleChoice(items=7).make_items(context(smollm2)) == many[:7]
    places = [sum(i.data["right"] == k for i in many) for k in range(4)]
    assert sum(places) == 200
    assert min(places) >= 30  # 50 expected; below 30 has probability 0.0003 for a fair shuffle


def test_the_right_choice_is_the_next_sentence_and_the_others_are_not(smollm2: Any) -> None:
    flat = " ".join(novel().split())
    for item in MultipleChoice(items=30, context=3).make_items(context(smollm2)):
        assert item.chat is False
        assert item.task == "choose"
        right = item.continuations[item.data["right"]]
        assert right == f" {item.expected}"
        assert " ".join(item.prompt.split()) + right in flat
        assert len(set(item.continuations)) == 4
        for other in set(item.continuations) - {right}:
            assert other.strip() in flat
            assert " ".join(item.prompt.split())[-60:] + other not in flat
            assert abs(len(other) - len(right)) <= 0.15 * len(right)


@pytest.mark.parametrize("choices", [2, 4, 8])
def test_chance_is_stated(choices: int, smollm2: Any) -> None:
    item = MultipleChoice(items=1, choices=choices).make_items(context(smollm2))[0]
    assert item.data["chance"] == 1 / choices
    assert len(item.continuations) == len(item.continuation_ids) == choices
    assert MultipleChoice.card.chance == 0.25 == 1 / MultipleChoice().choices


def test_choices_are_tokenised_as_in_the_running_text(smollm2: Any, with_bos: Any) -> None:
    for tokenizer, prefix in ((smollm2, []), (with_bos, [1])):
        for item in MultipleChoice(items=5, context=2).make_items(context(tokenizer)):
            for text, ids in zip(item.continuations, item.continuation_ids, strict=True):
                joined = tokenizer(item.prompt + text, add_special_tokens=False)["input_ids"]
                assert [*item.prompt_ids, *ids] == prefix + joined
                assert tokenizer.decode(ids) == text  # the leading space belongs to the choice, nothing is lost


def test_a_token_across_the_boundary_counts_to_every_choice() -> None:
    vocab = {t: i for i, t in enumerate(["a", ".", " ", "b", "c", ". "])}
    bpe = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [(".", " ")])))
    assert split_at_boundary(bpe, "a.", [" b", " c"]) == ([0], [[5, 3], [5, 4]])
    assert split_at_boundary(bpe, "a.", [" b", "c"]) == ([0], [[5, 3], [1, 4]])
    assert split_at_boundary(bpe, "a", [" b", "c"]) == ([0], [[2, 3], [4]])


def choice_result(nll: Sequence[Sequence[float]], right: int) -> ItemResult:
    texts = tuple(f" Choice {i}." for i in range(len(nll)))
    item = Item(
        "q", task="choose", continuations=texts, expected=f"Choice {right}.", data={"right": right, "chance": 1 / len(nll)}
    )
    return ItemResult(item, nll=[list(n) for n in nll])


def test_choices_by_hand() -> None:
    workload = MultipleChoice()
    # sums 6, 4, 3 but means 2, 4, 3: the mean decides, so a longer sentence is not punished
    nll = [[1.0, 2.0, 3.0], [4.0], [3.0]]
    good = workload.grade(choice_result(nll, right=0))
    assert (good.correct, good.text, good.data["chosen"]) == (True, "Choice 0.", 0)
    assert good.metrics == {"accuracy": 1.0, "nll": 2.0}
    assert good.data["mean_nll"] == [2.0, 4.0, 3.0]
    bad = workload.grade(choice_result(nll, right=1))
    assert (bad.correct, bad.text) == (False, "Choice 0.")
    assert bad.metrics == {"accuracy": 0.0, "nll": 4.0}
    assert workload.grade(choice_result([[math.nan], [9.0]], right=1)).correct is True
    assert workload.grade(choice_result([[math.nan], [math.inf]], right=0)).correct is False


def test_more_questions_than_the_novel_has_are_refused(smollm2: Any) -> None:
    with pytest.raises(WorkloadError) as error:
        MultipleChoice(items=1000, context=200).make_items(context(smollm2))
    assert "has only" in sentence_of(error)
    assert len(choosable()) >= 1000


# ---------------------------------------------------------------- prompts


def test_packaged_prompts(smollm2: Any) -> None:
    items = Prompts().make_items(context(smollm2))
    assert len(items) == 8
    lengths = [count(smollm2, i.prompt) for i in items]
    assert sum(n > 400 for n in lengths) == 2
    lines = asset("workloads/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    passages = [json.loads(line)["prompt"] for line in lines if json.loads(line)["kind"] == "passage"]
    for prompt in passages:
        assert all(part in novel() for part in prompt.split("\n\n")[1:-1])
    graded = [i.expected for i in items if i.expected]
    assert graded == ["Paris", "Mars", "Derbyshire"]


def test_one_prompt_of_ones_own(smollm2: Any) -> None:
    (item,) = Prompts(text=" Why is the sky blue? ").make_items(context(smollm2))
    assert (item.prompt, item.expected, item.task, item.chat) == (" Why is the sky blue? ", None, "generate", True)


def test_the_same_prompts_from_every_format(tmp_path: Path, smollm2: Any) -> None:
    rows = [{"q": 'One, "two"; three?', "a": "4"}, {"q": "Erste\nZeile: \u00fc", "a": ""}, {"q": "Last", "a": "x"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    quoted = [[c.replace('"', '""') for c in r.values()] for r in rows]
    for name, mark, start in (("p.csv", ",", "\ufeff"), ("semicolon.csv", ";", ""), ("p.tsv", "\t", "")):
        body = "\r\n".join(f'"{q}"{mark}"{a}"' for q, a in quoted)
        (tmp_path / name).write_bytes(f"{start}q{mark}a\r\n{body}\r\n".encode())
    for name in ("p.jsonl", "p.csv", "semicolon.csv", "p.tsv"):
        workload = Prompts(file=str(tmp_path / name), prompt_column="q", answer_column="a")
        items = workload.make_items(context(smollm2))
        assert [(i.prompt.replace("\r\n", "\n"), i.expected) for i in items] == [(r["q"], r["a"] or None) for r in rows], name
        assert [i.id for i in items][:2] == [
            "line-1" if name == "p.jsonl" else "line-2",
            "line-2" if name == "p.jsonl" else "line-3",
        ]
        assert len(workload.model_copy(update={"items": 2}).make_items(context(smollm2))) == 2


def test_a_txt_file_is_one_prompt_a_line(tmp_path: Path, smollm2: Any) -> None:
    (tmp_path / "p.txt").write_bytes(b"first\r\n\r\n  second \r\n")
    items = Prompts(file=str(tmp_path / "p.txt")).make_items(context(smollm2))
    assert [(i.id, i.prompt) for i in items] == [("line-1", "first"), ("line-3", "  second ")]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("missing.jsonl", None, "there is no file"),
        ("empty.jsonl", b"", "is empty"),
        ("binary.csv", b"prompt\n\x00\x01", "is binary, not text"),
        ("prompts.xlsx", b"PK", "allowed: .jsonl, .csv, .tsv, .txt"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 of"),
        ("list.jsonl", b'["a"]\n', "line 1 of"),
        ("columns.jsonl", b'{"question": "a", "label": 1}\n', "has no column 'prompt'; columns found: question, label"),
        ("columns.csv", b"question,label\na,1\n", "has no column 'prompt'; columns found: question, label"),
        ("header.csv", b"prompt,label\n", "has a header but no rows"),
        ("wide.csv", b"prompt\na,b\n", "line 2 of"),
        ("quote.csv", b'prompt\n"never closed\n', "is not valid CSV"),
        ("hole.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2 of"),
        ("number.jsonl", b'{"prompt": 5}\n', "has no text in column 'prompt'"),
        ("blank.csv", b"prompt,label\n,1\n", "has an empty prompt"),
        ("control.jsonl", b'{"prompt": "a\\u0000b"}\n', "is binary, not text"),
        ("half.jsonl", b'{"prompt": "a\\ud800b"}\n', "is binary, not text"),
    ],
)
def test_unusable_prompt_files_are_refused(name: str, content: bytes | None, part: str, tmp_path: Path, smollm2: Any) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WorkloadError) as error:
        Prompts(file=str(tmp_path / name)).make_items(context(smollm2))
    assert part in sentence_of(error)


def test_a_missing_answer_column_is_named(tmp_path: Path, smollm2: Any) -> None:
    (tmp_path / "p.csv").write_text("prompt,label\na,1\n")
    with pytest.raises(WorkloadError, match="has no column 'answer'; columns found: prompt, label"):
        Prompts(file=str(tmp_path / "p.csv"), answer_column="answer").make_items(context(smollm2))


@pytest.mark.parametrize(
    ("workload", "part"),
    [
        (Prompts(text=""), "the prompt is empty"),
        (Prompts(text=" \n"), "the prompt is empty"),
        (Prompts(text="a\x00b"), "the prompt is binary"),
        (Prompts(text="a", file="b.txt"), "both text and file"),
    ],
)
def test_unusable_texts_are_refused(workload: Prompts, part: str, smollm2: Any) -> None:
    with pytest.raises(WorkloadError) as error:
        workload.make_items(context(smollm2))
    assert part in sentence_of(error)


def test_a_prompt_of_one_megabyte_loads_and_is_refused_only_by_the_context(tmp_path: Path, smollm2: Any) -> None:
    big = (novel() * 2)[: 2**20]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "small"}) + "\n" + json.dumps({"prompt": big}) + "\n")
    (tmp_path / "p.csv").write_text('prompt\n"small"\n"' + big.replace('"', '""') + '"\n')
    for name, line in (("p.jsonl", 2), ("p.csv", 3)):
        workload = Prompts(file=str(tmp_path / name))
        items = workload.make_items(context(smollm2, longest=0))  # 0: context unknown
        assert items[1].prompt == big
        with pytest.raises(WorkloadError) as error:
            workload.make_items(context(smollm2))
        assert sentence_of(error).startswith(f"line {line} of ")
        assert "but the model's context is 8,192; shorten the prompt" in sentence_of(error)
    with pytest.raises(WorkloadError, match=r"the prompt with the chat template needs \d{3},\d{3} tokens"):
        Prompts(text=big).make_items(context(smollm2))


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [
        ("The capital is PARIS.", "Paris", True),
        ("comparison", "paris", False),
        ("It is 14.", "4", False),
        ("It is 4.", "4", True),
        ("New\n  York, of course", "new york", True),
        ("C++ it is", "C++", True),
        ("", "x", False),
    ],
)
def test_contained_answers_by_hand(text: str, answer: str, correct: bool) -> None:
    grade = Prompts().grade(ItemResult(Item("p", expected=answer), text=text))
    assert grade.correct is correct
    assert grade.metrics == {"accuracy": float(correct)}


def test_without_an_answer_nothing_is_judged() -> None:
    grade = Prompts().grade(ItemResult(Item("p"), text="anything"))
    assert (grade.correct, grade.text, grade.metrics) == (None, "anything", {})


# ---------------------------------------------------------------- speed


@pytest.mark.parametrize("tokens", [4, 256, 1000])
def test_speed_prompts_have_the_exact_length(tokens: int, smollm2: Any, with_bos: Any) -> None:
    for tokenizer in (smollm2, with_bos):
        items = Speed(items=3, prompt_tokens=tokens, new_tokens=7).make_items(context(tokenizer))
        assert [len(i.prompt_ids) for i in items] == [tokens] * 3
        assert all(i.ignore_eos and i.max_new_tokens == 7 and not i.chat for i in items)
        assert items[1] == replace(items[0], id="repetition-1")
    assert with_bos.decode(items[0].prompt_ids[1:]) == items[0].prompt
    assert novel().startswith(items[0].prompt)


# ---------------------------------------------------------------- what n items can show


def test_detectable_differences() -> None:
    assert fewest_changes() == 6  # 2 * 0.5^6 = 0.031 < 0.05 < 0.063 = 2 * 0.5^5
    # two-sided t, n = 5, 4 degrees: t(0.975) = 2.776, t(0.80) = 0.941 (tables)
    assert smallest_shift(5, 0.03) == pytest.approx((2.776 + 0.941) * 0.03 / math.sqrt(5), rel=1e-3)
    assert "12 show only 6 or more answers lost and none won, 50 points" in Needle.card.detects
