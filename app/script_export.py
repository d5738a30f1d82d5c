"""A pipeline as one Python file that gives the same tokens without the studio.

The file holds the sources of :mod:`workers.standalone`, of the pipeline's policies and of every module of
this project that they import, found by following imports in their syntax trees; nothing is imported here.
Inside the file they live under their own names in an importer that never looks at the disk, so names cannot
clash and a traceback names the real module. Other packages (torch, transformers ...) must be installed.
"""

from __future__ import annotations

import ast
import json
import pprint
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from studio_state import __version__
from studio_state.catalog import Catalog
from studio_state.errors import SpecError
from studio_state.events import Event, ItemStarted
from studio_state.experiment import ExperimentSpec
from studio_state.results import LaneResults, Results, results_of
from studio_state.zoo import find as find_in_zoo

MAIN = "workers.standalone"
ROOMS = ("workers", "studio_state")
NATIVE = "workers.mechanisms.native"  # compiles the files of C beside it, which a script carries
LEFT_OUT = ("workers.workloads.registry", "workers.recipe")  # listed for the catalogue; a script has none

HEADER = '''\
#!/usr/bin/env python3
# {title}
#
# Exported by Pareto Studio {version} from experiment {experiment}, lane {lane}.
# The modules below are part of Pareto Studio, licensed under the Apache License, Version 2.0
# (https://www.apache.org/licenses/LICENSE-2.0). The model has a licence of its own.
#
# Needs: {needs}
# Run:   python {file} [--model FOLDER|FILE.gguf|HUB-ID] [--prompt TEXT]
{note}#
# Without --prompt it runs the recorded prompts and says whether the tokens are the recorded ones.

import importlib.abc
import importlib.util
import linecache
import sys

SOURCES = {{}}
PACKAGES = {packages!r}


class Bundle(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of this file before any that may be installed."""

    def find_spec(self, name, path=None, target=None):
        if name in SOURCES or name in PACKAGES:
            return importlib.util.spec_from_loader(name, self, origin=f"<{{name}}>", is_package=name in PACKAGES)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name, source = module.__name__, SOURCES.get(module.__name__, "")
        linecache.cache[f"<{{name}}>"] = (len(source), None, source.splitlines(True), f"<{{name}}>")
        exec(compile(source, f"<{{name}}>", "exec"), module.__dict__)


sys.meta_path.insert(0, Bundle())
'''
FOOTER = """
SETTINGS = {settings}

if __name__ == "__main__":
    from workers.standalone import main

    sys.exit(main(SETTINGS))
"""


@dataclass(frozen=True)
class Module:
    """One module of this project: its name, its source, and whether it is a package."""

    name: str
    source: str
    is_package: bool


def export_script(events: Iterable[Event], lane: int, catalog: Catalog, file: str = "pipeline.py") -> str:
    """The script of one lane of a recorded experiment.

    Args:
        file: the name it will have, for its own help text.

    Raises:
        SpecError: the lane does not exist, did not finish, or made no tokens.
    """
    told = list(events)
    found = results_of(told)
    spec, results = _finished_lane(found, lane)
    if found.model and found.model.packed:
        raise SpecError(
            f"{spec.model} holds packed weights ({found.model.packed}), which a script without the studio cannot read; "
            "run the pipeline on the model that they were packed from, and export that lane"
        )
    policies = [(*policy_class(step.policy), step.knobs) for step in spec.lanes[lane].ordered(catalog).steps]
    modules = bundle([MAIN, *(module for module, _, _ in policies)])
    model, note = _model(found)
    settings = {
        "pipeline": spec.lanes[lane].text(),
        "model": model,
        "revision": found.model.revision if found.model else "",
        "spec": {**spec.model_dump(mode="json"), "lanes": [{}], "reference": 0, "batch": 1, "isolate": False},
        "info": found.model.model_dump(mode="json") if found.model else {},
        "policies": policies,
        "recorded": _recorded(told, results),
    }
    header = HEADER.format(
        title=f"{spec.lanes[lane].text()} on {spec.model}", version=__version__, experiment=found.experiment, lane=lane, file=file, note=note,
        needs=" ".join(needed_packages(modules)), packages=tuple(m.name for m in modules if m.is_package),
    )  # fmt: skip
    body = "".join(_embedded(m) for m in modules if m.source)
    return header + body + FOOTER.format(settings=pprint.pformat(settings, width=120, sort_dicts=False))


def _finished_lane(found: Results, lane: int) -> tuple[ExperimentSpec, LaneResults]:
    if found.spec is None or not 0 <= lane < len(found.lanes):
        raise SpecError(f"there is no lane {lane}; this experiment has lanes 0 to {len(found.lanes) - 1}")
    results, spec = found.lanes[lane], found.spec
    if results.status != "finished":
        raise SpecError(f"lane {lane} ended as {results.status}; a script is made of a lane that finished")
    if found.model is None or found.model.family != "llm":
        raise SpecError("scripts can be made of language models only")
    if not any(o.kind == "text" and o.data.get("token_ids") for o in results.outputs.values()):
        raise SpecError(f"the workload {spec.workload.id} generates no tokens; export a run of prompts, needle or speed")
    if spec.batch > 1 and spec.sampling.temperature > 0:
        raise SpecError("tokens drawn at random in batches depend on the batch; run it with batch 1, then export it")
    return spec, results


def _model(found: Results) -> tuple[str, str]:
    """What the script loads by default, and a line about it for its head."""
    name = found.spec.model if found.spec else ""
    entry = find_in_zoo(name)
    if entry is None:  # a folder, a GGUF file or a Hub id, whose commit stands beside it
        return name.partition("@")[0] if found.model and found.model.revision else name, ""
    if repo := getattr(entry.source, "repo", ""):
        return str(repo), ""
    where = f"# Model: {entry.title} from {entry.source.place()};\n"
    return entry.id, f"{where}#        give --model that file, or the folder zoo/{entry.id} of the studio's model cache.\n"


def _recorded(events: Iterable[Event], results: LaneResults) -> list[dict[str, Any]]:
    """Prompt, its tokens as text, and the tokens that came of it, of every item."""
    prompts = {e.item: e for e in events if isinstance(e, ItemStarted) and e.prompt}
    return [
        {"item": o.item, "prompt": prompts[o.item].prompt, "pieces": prompts[o.item].pieces, "token_ids": o.data["token_ids"]}
        for o in results.outputs.values()
        if o.item in prompts and o.data.get("token_ids")
    ]


# -- sources -----------------------------------------------------------------------------------
def bundle(roots: Iterable[str]) -> list[Module]:
    """The given modules and everything of this project that they import, packages included, by name."""
    found: dict[str, Module] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found or name.startswith(LEFT_OUT):
            continue
        path = source_path(name)
        if path is None:
            raise SpecError(f"the source of {name} cannot be found; reinstall the studio with its sources")
        is_package = path.name == "__init__.py"
        found[name] = Module(
            name, path.read_text(encoding="utf-8") + (carried(path.parent) if name == NATIVE else ""), is_package
        )
        waiting += [n for n in imported(found[name]) if source_path(n) is not None]
        if parent := name.rpartition(".")[0]:
            waiting.append(parent)
    return [found[name] for name in sorted(found)]


def carried(folder: Path) -> str:
    """The files of C in a folder, as the statement by which a script hands them over."""
    files = {file.name: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.[ch]"))}
    return f"\nCARRIED.update({files!r})\n"


def source_path(name: str) -> Path | None:
    """The file of a module of this project, without importing it; None for anything else."""
    room, _, rest = name.partition(".")
    spec = find_spec(room) if room in ROOMS else None
    if spec is None or not spec.submodule_search_locations:
        return None
    base = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest.split(".") if rest else ())
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def imported(module: Module) -> Iterator[str]:
    """Full names that a module imports when it runs, also inside functions; not those for type checkers."""
    tree = ast.parse(module.source)
    skipped = {id(n) for block in ast.walk(tree) if _for_type_checkers(block) for n in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if source_path(full) else node.module


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def policy_class(policy: str) -> tuple[str, str]:
    """Module and class of a policy, found in the sources by the id on its card.

    Raises:
        SpecError: no file declares it.
    """
    home = source_path("workers.policies")
    for path in sorted(home.parent.rglob("*.py")) if home else ():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and policy in _card_ids(node):
                inside = path.relative_to(home.parent).with_suffix("").parts  # type: ignore[union-attr]
                return ".".join(("workers", "policies", *inside)), node.name
    raise SpecError(f"the source of the policy {policy!r} cannot be found; reinstall the studio with its sources")


def _card_ids(cls: ast.ClassDef) -> set[str]:
    calls = [
        n.value
        for n in cls.body
        if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "card" and isinstance(n.value, ast.Call)
    ]
    return {str(k.value.value) for c in calls for k in c.keywords if k.arg == "id" and isinstance(k.value, ast.Constant)}


def needed_packages(modules: Iterable[Module]) -> list[str]:
    """Distributions that the sources import, with the versions installed here."""
    tops = {n.partition(".")[0] for m in modules for n in imported(m)} | {"torch", "transformers", "safetensors"}
    providers = metadata.packages_distributions()
    names = {providers[t][0] for t in tops - set(sys.stdlib_module_names) - set(ROOMS) - {"assets"} if t in providers}
    return sorted(f"{n}=={metadata.version(n).partition('+')[0]}" for n in names)


def _embedded(module: Module) -> str:
    """One module as an assignment; a raw string where its text allows it."""
    text = module.source
    plain = "'''" not in text and not text.endswith(("'", "\\"))
    literal = f"r'''{text}'''" if plain else json.dumps(text)
    line = "=" * max(3, 100 - len(module.name))
    return f"\n# {module.name} {line}\nSOURCES[{module.name!r}] = {literal}\n"
