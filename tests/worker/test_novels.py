"""The novels: read from R's files, cut where they are held out, in tokens, in rows; and what is counted on them."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio_state.catalog import asset
from studio_state.errors import WorkloadError
from tests.r_data import HEAD, characters, integers, named, strings, write_database
from workers.data import novels
from workers.data.novels import NOVELS, held_out, novel_text, split_chapters, training_chapters
from workers.data.r_data import read_database, read_value
from workers.training.loop import TrainingRun
from workers.training.novel_lessons import UNSCORED, Rows, as_stream, held_out_ids, likelihood, next_token_loss, row_of, windows
from workers.training.novel_scores import balance_loss, pair_scores, routing_scores, shared_bits
from workers.training.novel_tokenizer import novel_tokenizer

PACKAGE = Path(os.environ.get("JANEAUSTENR_DATA", novels.FOLDER))
OTHER = ["Chapter 1", "", "It was a wet day.", "Nobody went out.", "", "Finis"]


# -- R's files


def test_a_value_as_r_writes_it() -> None:
    text = bytes.fromhex("580a 00000002 00040201 00020300  00000010 00000002  00040009 00000002 6f6b  00000009 ffffffff")
    assert read_value(text) == ["ok", None]
    assert read_value(text[:14] + struct.pack(">iid", 14, 1, 0.5)) == [0.5]
    assert read_value(text[:14] + struct.pack(">iii", 16, 1, 0x00004009) + b"\0\0\0\1\xa3") == ["£"]  # marked as Latin-1


def test_names_references_and_attributes() -> None:
    inner = named({"b": integers([2, 3]), "c": strings(["£ é"])}, struct.pack(">i", 0x1FF))
    first = named({"x": strings(["y"])})  # the symbol "names" comes first here
    value = HEAD + struct.pack(">ii", 19, 2) + first + inner
    assert read_value(value) == [{"x": ["y"]}, {"b": [2, 3], "c": ["£ é"]}]
    assert read_value(HEAD + struct.pack(">i", 254)) is None


@pytest.mark.parametrize("data", [b"", b"A\n" + HEAD[2:], HEAD[:9], HEAD + strings(["a"])[:-1], HEAD + struct.pack(">ii", 3, 0)])
def test_values_that_cannot_be_read(data: bytes) -> None:
    with pytest.raises((ValueError, struct.error)):
        read_value(data)


def test_a_database_and_what_is_wrong_with_others(tmp_path: Path) -> None:
    stem = tmp_path / "Rdata"
    write_database(stem, {"one": ["a", ""], "two": ["£"]})
    assert read_database(stem, ["two", "one"]) == {"two": ["£"], "one": ["a", ""]}
    for wanted in ("three", "no plain data"):
        with pytest.raises(WorkloadError, match=f"it holds no '{wanted}', but one, two"):
            read_database(stem, ["one", wanted])
    whole = stem.with_suffix(".rdb").read_bytes()
    for damaged in (whole[:-9], b"", whole[:4] + bytes(len(whole) - 4), b"\0\0\0\0" + whole[4:]):
        stem.with_suffix(".rdb").write_bytes(damaged)
        with pytest.raises(WorkloadError, match="no R database that can be read"):
            read_database(stem, ["one", "two"])
    write_database(stem, {"one": ["a"]}, compressed=2)
    with pytest.raises(WorkloadError, match="not packed with zlib"):
        read_database(stem, ["one"])
    for index in (b"text", gzip.compress(HEAD + strings(["a"])), gzip.compress(HEAD + characters("a"))):
        stem.with_suffix(".rdx").write_bytes(index)
        with pytest.raises(WorkloadError, match="no R database that can be read"):
            read_database(stem, ["one"])


# -- the text


def test_what_belongs_to_the_edition_is_left_out() -> None:
    lines = [
        *("EMMA", "", "By Jane Austen", "", "VOLUME I", "", "", "CHAPTER I", ""),
        *(
            "Emma  had been _so_ happy,",
            "that nothing",
            "",
            "    * * *",
            "",
            "[End volume one of this edition.]",
            "",
            "[To Mrs. Weston.]",
        ),
        *(
            "",
            "(End of volume one.)",
            "",
            "VOLUME II",
            "",
            "Chapter 2",
            "",
            "    Verse,",
            "      more verse.",
            " ",
            "A chapter in one line.",
        ),
        *("", "", "THE END", "", "A note"),
    ]
    text = novel_text(lines)
    assert text.split("\n\n") == [
        *("CHAPTER I", "Emma had been so happy, that nothing", "[To Mrs. Weston.]"),
        *("Chapter 2", "Verse, more verse.", "A chapter in one line."),
    ]
    assert split_chapters(text) == [text[: text.index("\n\nChapter 2")], text[text.index("Chapter 2") :]]
    with pytest.raises(WorkloadError, match="no line such as 'Chapter 1'"):
        novel_text(["By Jane Austen"])


def test_the_held_out_part_is_what_the_readme_says() -> None:
    packed = asset(novels.HELD_OUT_FILE).read_bytes()
    assert len(held_out()) == novels.HELD_OUT_CHARACTERS == 60_000
    readme = (asset("workloads") / "README.md").read_text()
    for data in (packed, held_out().encode()):
        assert hashlib.sha256(data).hexdigest() in readme


def package(folder: Path, ending: str) -> Path:
    """Six short novels; *Persuasion* ends so."""
    persuasion = [
        "Persuasion",
        "",
        "Chapter 1",
        "",
        "Sir Walter Elliot read.",
        "",
        "Chapter 2",
        "",
        "He read on," + ending,
        "",
        "Finis",
    ]
    write_database(folder / "Rdata", {name: persuasion if name == "persuasion" else OTHER for name in NOVELS})
    return folder


def test_nothing_that_is_held_out_is_trained_on(tmp_path: Path) -> None:
    other = "Chapter 1\n\nIt was a wet day. Nobody went out."
    lines = held_out().replace("\n\n", "\n \n")  # one string may hold several lines
    found = training_chapters(package(tmp_path, lines))
    assert found == [other] * 3 + ["Chapter 1\n\nSir Walter Elliot read.", "Chapter 2\n\nHe read on,"] + [other] * 2
    with pytest.raises(WorkloadError, match="does not end with the 60,000 characters"):
        training_chapters(package(tmp_path, lines[:-2]))


def test_folders_without_the_novels(tmp_path: Path) -> None:
    with pytest.raises(
        WorkloadError, match=r"Rdata\.rdb is not there; give the data folder of the R package janeaustenr \(Debian: "
    ):
        training_chapters(tmp_path)
    write_database(tmp_path / "Rdata", {"emma": OTHER})
    with pytest.raises(WorkloadError, match="it holds no 'mansfieldpark', but emma"):
        training_chapters(tmp_path)
    write_database(tmp_path / "Rdata", {name: [None] if name == "emma" else OTHER for name in NOVELS})
    with pytest.raises(WorkloadError, match=r"emma in .* is no text"):
        training_chapters(tmp_path)


@pytest.mark.skipif(not (PACKAGE / "Rdata.rdb").exists(), reason="the package r-cran-janeaustenr is not installed")
def test_the_package_gives_the_novel_that_ships() -> None:
    shipped = gzip.decompress(asset("workloads/pride-and-prejudice.txt.gz").read_bytes()).decode()
    found = novels.novel_lines(PACKAGE)
    assert novel_text(found["prideprejudice"]) + "\n" == shipped
    chapters = training_chapters(PACKAGE)
    assert (len(chapters), sum(map(len, chapters))) == (267, 3_952_085)
    every = "".join(chapters)
    assert not {"_", "\r", "\t"} & set(every)
    assert held_out()[:200] not in every
    assert held_out()[-200:] not in every


# -- tokens


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return novel_tokenizer([held_out()[:20_000]], 600)


def test_every_text_comes_back_from_its_tokens(tokenizer: Any) -> None:
    texts = ["", "a", "  two  spaces \n\n\tand\r\n", "naïve £5 — 日本 🎉", "\x00\x7f\u0301", held_out()[20_000:30_000]]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) <= len(text.encode())
    assert len(tokenizer) == 600
    assert len(tokenizer(texts[-1])["input_ids"]) < 6000
    marks = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    assert marks == (0, 1, 2)
    assert tokenizer("a", add_special_tokens=True)["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


def test_the_same_text_gives_the_same_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    again = novel_tokenizer(iter([held_out()[:20_000]]), 600)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.decode(loaded("Anne £ 日\n")["input_ids"]) == "Anne £ 日\n"
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def test_the_stream_marks_where_chapters_begin_and_end(tokenizer: Any) -> None:
    ids = as_stream(["Anne", "", "Anne"], tokenizer).tolist()
    anne = tokenizer("Anne")["input_ids"]
    assert ids == [1, *anne, 2, 1, 2, 1, *anne, 2]


# -- rows


def test_rows_by_hand() -> None:
    stream = np.arange(10, 20)
    ids, labels = zip(*(row_of(stream, 4, 7, n) for n in range(3)), strict=True)
    assert [x.tolist() for x in ids] == [[17, 18, 19, 10], [11, 12, 13, 14], [15, 16, 17, 18]]
    assert [x.tolist() for x in labels] == [[18, 19, 10, 11], [12, 13, 14, 15], [16, 17, UNSCORED, UNSCORED]]


@pytest.mark.parametrize(("tokens", "length", "batch_size"), [(10, 4, 2), (7, 7, 1), (5, 8, 2), (64, 16, 3), (33, 4, 4)])
def test_in_each_pass_every_token_is_predicted_once(tokens: int, length: int, batch_size: int, tmp_path: Path) -> None:
    stream = np.arange(100, 100 + tokens)
    rows = Rows(TrainingRun(tmp_path, 3), "rows", stream, length, batch_size)
    passes = 5
    batches = [rows.batch(step) for step in range(-(-passes * rows.per_pass // batch_size))]
    assert all(b.ids.shape == b.labels.shape == (batch_size, length) for b in batches)
    ids, labels = (torch.cat([getattr(b, name) for b in batches])[: passes * rows.per_pass] for name in ("ids", "labels"))
    there = labels != UNSCORED
    assert ((ids[there] - 100 + 1) % tokens + 100 == labels[there]).all()
    for number in range(passes):
        part = labels[number * rows.per_pass : (number + 1) * rows.per_pass]
        assert Counter(part[part != UNSCORED].tolist()) == Counter(stream.tolist())
    starts = {tuple(r) for r in ids.tolist()}
    assert len(starts) > rows.per_pass or rows.per_pass == 1  # passes cut at different places
    again = Rows(TrainingRun(tmp_path, 3), "rows", stream, length, batch_size)
    last = len(batches) - 1
    assert torch.equal(again.batch(last).ids, batches[last].ids)  # whatever was asked before
    other = Rows(TrainingRun(tmp_path, 4), "rows", stream, length, batch_size)
    assert any(not torch.equal(other.batch(i).ids, b.ids) for i, b in enumerate(batches))


def test_the_loss_by_hand() -> None:
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0], [5.0, -5.0]]], dtype=torch.float64)
    labels = torch.tensor([[0, 1, UNSCORED]])
    assert next_token_loss(logits, labels).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-6)


# -- perplexity


@pytest.mark.parametrize("tokens", [2, 13, 256, 257, 512, 513, 768, 769, 1700])
def test_windows_score_every_token_but_the_first_once(tokens: int) -> None:
    at = 1
    for number, window in enumerate(windows(range(tokens))):
        assert window.ids.shape[1] <= 512
        assert window.scored.tolist() == list(range(at, at + len(window.scored)))
        assert len(window.scored)
        before = window.scored[0].item() - window.ids[0, 0].item()
        assert before == (256 if number else 1)
        logits = torch.arange(window.ids.shape[1], dtype=torch.float32)[None, :, None]
        assert (window.ids[0][window.at_scored(logits)[:, 0].long()] == window.scored - 1).all()
        at += len(window.scored)
    assert at == tokens


def test_perplexity_against_a_count_token_by_token(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = held_out_ids(tokenizer, 529)
    assert len(ids) == 530
    nats = 0.0
    with torch.inference_mode():
        for first, begin, end in ((0, 1, 512), (256, 512, 530)):
            cache = None
            for i in range(first, end - 1):  # one token at a time, through the cache
                out = model(input_ids=torch.tensor([[ids[i]]]), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                if i + 1 >= begin:
                    row = out.logits[0, -1].double().numpy()
                    nats += np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[i + 1]]
    told: list[str] = []
    found, scored = likelihood(model, tokenizer, ids, lambda text, done: told.append(text))
    assert scored == 529
    assert found["perplexity"] == pytest.approx(math.exp(nats / 529), rel=1e-5)
    assert held_out().startswith(tokenizer.decode(ids))
    characters = len(tokenizer.decode(ids)) - len(tokenizer.decode(ids[:1]))
    assert found["bits_per_character"] == pytest.approx(nats / math.log(2) / characters, rel=1e-5)
    assert told == ["scoring: 0 of 529 tokens", "scoring: 511 of 529 tokens"]


# -- experts and pairs


def test_the_balancing_loss_by_hand() -> None:
    even = torch.eye(4) * 50
    assert balance_loss([even], 1).item() == pytest.approx(1)
    assert balance_loss([even[:1].repeat(4, 1)], 1).item() == pytest.approx(4)
    assert balance_loss([even, even[:1].repeat(4, 1)], 1).item() == pytest.approx(2.5)
    halves = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.5, 0.3]]).log()
    # choices of two: (0, 1) or (0, 2), see the tie; then (1, 2): loads by hand
    chosen = halves.softmax(-1).topk(2).indices
    load = [(chosen == e).sum().item() / 4 for e in range(3)]
    assert balance_loss([halves], 2).item() == pytest.approx(
        3 * sum(x * p for x, p in zip(load, (0.35, 0.375, 0.275), strict=True))
    )
    uneven = (even[:1].repeat(4, 1) / 50).requires_grad_()
    balance_loss([uneven], 1).backward()
    assert (uneven.grad[:, 0] > 0).all()  # a step down takes from the expert that has all
    assert (uneven.grad[:, 1:] < 0).all()


def test_going_down_the_balancing_loss_evens_the_use() -> None:
    torch.manual_seed(0)
    hidden, router = torch.randn(512, 8) + 1, torch.nn.Parameter(torch.randn(4, 8))

    def most() -> float:
        return (hidden @ router.T).topk(2).indices.flatten().bincount(minlength=4).max().item() / 1024

    before, optimizer = most(), torch.optim.Adam([router], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        balance_loss([hidden @ router.T], 2).backward()
        optimizer.step()
    assert before > 0.35
    assert most() < 0.27


def test_shared_bits_by_hand() -> None:
    a = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    assert shared_bits(a, a) == pytest.approx(2)
    assert shared_bits(a, a // 2) == pytest.approx(1)
    assert shared_bits(a, np.tile([0, 1], 4)) == pytest.approx(0)
    assert shared_bits(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])) == pytest.approx(0.311278, abs=1e-6)


def tiny(name: str, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "initializer_range": 0.3, **changes}
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts)).eval()


def test_experts_are_counted_as_the_routers_choose_them() -> None:
    model, ids = tiny("moe"), (torch.arange(40) * 7 % 64).tolist()
    chosen: list[torch.Tensor] = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda m, a, out: chosen.append(out[2])) for layer in model.model.layers]
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    loads = [(layer[1:] == e).sum().item() / (39 * 2) for layer in chosen for e in range(4)]
    found = routing_scores(model, ids, 2)
    assert (found["expert_load_least"], found["expert_load_most"]) == (pytest.approx(min(loads)), pytest.approx(max(loads)))
    for layer in model.model.layers:  # a router that reads nothing tells nothing
        layer.mlp.gate.weight.data.zero_()
    found = routing_scores(model, ids, 2)
    assert found == {"expert_load_least": 0.0, "expert_load_most": 0.5, "token_expert_bits": 0.0}


def test_routing_by_token_alone_shares_bits() -> None:
    model, ids = (
        tiny("moe", num_hidden_layers=1),
        torch.randint(0, 64, (3000,), generator=torch.Generator().manual_seed(1)).tolist(),
    )
    found = routing_scores(model, ids, 2)["token_expert_bits"]
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()  # each token for itself
    assert 0 < found < routing_scores(model, ids, 2)["token_expert_bits"] <= 2


def test_a_pair_against_itself_and_against_chance() -> None:
    target, ids = tiny("llama"), (torch.arange(60) * 11 % 64).tolist()
    assert pair_scores(target, target, ids) == {"greedy_agreement": 1.0, "expected_acceptance": pytest.approx(1.0)}
    chance = tiny("llama", tie_word_embeddings=False)
    chance.lm_head.weight.data.zero_()
    with torch.inference_mode():
        p = torch.softmax(target(input_ids=torch.tensor([ids])).logits[0, :-1], -1).numpy()
    found = pair_scores(target, chance, ids)
    assert found["expected_acceptance"] == pytest.approx(np.minimum(p, 1 / 64).sum(1).mean(), rel=1e-5)
    assert found["greedy_agreement"] == pytest.approx((p.argmax(1) == 0).mean())
