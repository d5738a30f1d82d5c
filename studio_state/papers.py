"""The papers page as data: every system of the reading list, and what of it runs here."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from studio_state.catalog import asset

PaperFamily = Literal["llm", "vlm", "diffusion", "vit", "encoder", "cnn", "speech", "detector", "vla"]


class Paper(BaseModel):
    """One system.

    Attributes:
        date: of its first publication: ``2024-03-17``, or ``2025-06`` where only the month is known.
        summary: what it is, in our own words.
        card: short id of its method card, for example ``b4-02``.
        families: kinds of model it is about; wider than the families that run here.
        role: what kind of thing it would be in a pipeline, in a few words.
        runs_as: methods of the catalogue that run it or its central idea; empty = not built yet.
        claims: claims that test its headline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    title: str
    date: str = Field(pattern=r"^\d{4}-\d{2}(-\d{2})?$")
    summary: str
    card: str = Field(pattern=r"^b\d-\d{2}$")
    families: tuple[PaperFamily, ...] = Field(min_length=1)
    role: str
    runs_as: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()

    def status(self) -> str:
        """``runs here as rtn, magnitude``, or ``not built yet``."""
        return f"runs here as {', '.join(self.runs_as)}" if self.runs_as else "not built yet"


class Papers(BaseModel):
    """All papers. ``Papers.load()`` reads the packaged file."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    papers: list[Paper]

    @cached_property
    def by_id(self) -> dict[str, Paper]:
        """Paper id -> paper."""
        return {p.id: p for p in self.papers}

    @classmethod
    def load(cls, path: Path | None = None) -> Papers:
        """Read the list.

        Args:
            path: another file than the packaged ``assets/papers.json``.
        """
        return cls.model_validate(json.loads((path or asset("papers.json")).read_text(encoding="utf-8")))
