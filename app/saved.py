"""Named pipelines as JSON files in the data directory, readable by ``--lane @file.json`` too."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

from studio_state.errors import SpecError, StoreError
from studio_state.paths import cannot
from studio_state.pipeline import Pipeline, pipeline_from_data, read_pipeline

MAX_SAVED = 200
MAX_NAME = 80


class SavedPipelines:
    """The saved pipelines of one data directory.

    Args:
        folder: made on the first save.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()

    def all(self) -> list[Pipeline]:
        """The saved pipelines by name; files that do not hold a pipeline are passed over."""
        if not self.folder.is_dir():
            return []
        return sorted(filter(None, map(_read, self.folder.glob("*.json"))), key=lambda p: p.name.lower())

    def save(self, data: Any) -> Pipeline:
        """Keep a pipeline under its name; an older one of that name is replaced.

        Raises:
            SpecError: no name, an empty pipeline, or too many saved ones.
            StoreError: it cannot be written.
        """
        pipeline = pipeline_from_data(data, "the lane")
        name = " ".join(pipeline.name.split())[:MAX_NAME]
        if not name:
            raise SpecError("give the lane a name before saving it")
        if not pipeline.steps:
            raise SpecError("an empty lane is the baseline; add a policy before saving it")
        pipeline = pipeline.model_copy(update={"name": name})
        with self._lock:
            target = self.folder / f"{_file_name(name)}.json"
            if not target.exists() and len(self.all()) >= MAX_SAVED:
                raise SpecError(f"{MAX_SAVED} pipelines are saved already; forget some first")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                part = target.with_suffix(".part")
                part.write_text(json.dumps(pipeline.model_dump(mode="json"), indent=1, ensure_ascii=False), encoding="utf-8")
                part.replace(target)
            except OSError as e:
                raise cannot(f"save the pipeline in {self.folder}", e) from e
        return pipeline

    def forget(self, name: str) -> None:
        """Delete the pipeline of this name; nothing happens if there is none.

        Raises:
            StoreError: it cannot be deleted.
        """
        with self._lock:
            try:
                (self.folder / f"{_file_name(name)}.json").unlink(missing_ok=True)
            except OSError as e:
                raise cannot(f"delete from {self.folder}", e) from e


def _read(path: Path) -> Pipeline | None:
    try:
        return read_pipeline(path)
    except (SpecError, StoreError):
        return None


def _file_name(name: str) -> str:
    """A file name that any system takes, different for different names."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    return f"{plain or 'pipeline'}-{name.encode().hex()[-8:]}-{len(name)}"
