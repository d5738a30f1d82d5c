"""The reading list: complete, unique, and honest about what runs here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from studio_state.catalog import Catalog, asset
from studio_state.claims import load_claims
from studio_state.papers import Papers

# the method cards are numbered b1-01 .. b1-16, b2-01 .. b2-15, b3-01 .. b3-17, b4-01 .. b4-20
CARDS = {f"b{batch}-{i:02}" for batch, last in ((1, 16), (2, 15), (3, 17), (4, 20)) for i in range(1, last + 1)}


def test_there_are_68_systems_each_with_its_own_card() -> None:
    papers = Papers.load().papers
    assert len(papers) == 68
    assert len({p.id for p in papers}) == len({p.title for p in papers}) == 68
    assert len([p.card for p in papers]) == len(CARDS)
    assert {p.card for p in papers} == CARDS


def test_summaries_are_one_or_two_sentences() -> None:
    for paper in Papers.load().papers:
        assert paper.summary == paper.summary.strip()
        assert paper.summary.endswith(".")
        assert 1 <= paper.summary.count(". ") + 1 <= 2, paper.id
        assert 40 <= len(paper.summary) <= 240, paper.id


def test_what_runs_here_is_in_the_catalogue() -> None:
    methods = set(Catalog.load().by_id)
    papers = Papers.load().by_id
    assert {m for p in papers.values() for m in p.runs_as} <= methods
    assert papers["promptdistill"].status() == "runs here as promptdistill"
    assert papers["splitwise"].status() == "not built yet"


def test_claims_and_papers_point_at_each_other() -> None:
    claims, papers = load_claims(), Papers.load().by_id
    assert {(p.id, c) for p in papers.values() for c in p.claims} == {(c.paper, c.id) for c in claims.values() if c.paper}


def test_a_list_with_an_unknown_family_is_refused(tmp_path: Path) -> None:
    data = json.loads(asset("papers.json").read_text(encoding="utf-8"))
    data["papers"][0]["families"] = ["steam-engine"]
    file = tmp_path / "papers.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValidationError, match="families"):
        Papers.load(file)
