"""The assembled Space: its files, its front matter, its pins; what is refused; and the copies that outlive it."""

from __future__ import annotations

import re
import resource
import shutil
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from app import space
from app.__main__ import explain
from app.hosted import HostedLimits
from app.space import ENTRY, HELD_BACK, TORCH_INDEX, assemble, pinned, requirements
from app.space_keep import Keeper
from app.space_start import read_port, start
from studio_state import zoo
from studio_state.errors import SpecError, StoreError, Unavailable
from studio_state.events import Finished, Note, Submitted
from studio_state.experiment import ExperimentSpec
from studio_state.journal import Tag, append_entries
from studio_state.paths import DataDir
from studio_state.spool import SpoolWriter, read_spool
from studio_state.store import Store

ROOT = Path(__file__).parents[2]
KEYS = [
    "title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "short_description", "license",
    "suggested_hardware", "startup_duration_timeout", "fullWidth", "header", "tags",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> space.Space:
    return assemble(tmp_path_factory.mktemp("made") / "deep" / "space", 'A: "race" # for {you}')


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def dependencies() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


# -- what is in it


def test_it_holds_the_studio_and_nothing_of_its_making(made: space.Space) -> None:
    found = names(made.folder)
    assert {n for n in found if "/" not in n} == {"README.md", "requirements.txt", ENTRY, ".gitattributes", "LICENSE"}
    assert {n.split("/")[0] for n in found if "/" in n} == {"app", "workers", "studio_state", "assets"}
    assert not [n for n in found if re.search(r"tests/|__pycache__|\.pyc$|\.pyi$|\.part$|bench/|assets/(docs|images|space)/", n)]
    assert {n for n in found if n.endswith(".safetensors")} == {
        p.relative_to(ROOT).as_posix()
        for folder in zoo.shipped_folders()
        for p in (ROOT / "assets/zoo" / folder).rglob("*.safetensors")
    }
    for name in ("app/components/page.css", "app/components/dom.js", "assets/catalog.json", "assets/workloads/prompts.jsonl"):
        assert (made.folder / name).read_bytes() == (ROOT / name).read_bytes()
    assert (made.folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (made.files, made.bytes) == (len(found), sum((made.folder / n).stat().st_size for n in found))
    assert list(made.folder.parent.iterdir()) == [made.folder]


def test_every_large_file_goes_through_lfs(made: space.Space) -> None:
    kinds = re.findall(r"^\*(\.\w+) filter=lfs diff=lfs merge=lfs -text$", (made.folder / ".gitattributes").read_text(), re.M)
    assert kinds == [".safetensors", ".gz"]
    for path in made.folder.rglob("*"):
        if path.is_file() and path.suffix not in kinds:
            path.read_text(encoding="utf-8")  # the Hub takes other binary files through LFS only
            assert path.stat().st_size < 1_000_000


def test_the_entry_shadows_no_package(made: space.Space) -> None:
    tops = {p.name for p in made.folder.iterdir() if p.is_dir()}
    assert Path(ENTRY).stem not in tops
    compile((made.folder / ENTRY).read_text(), ENTRY, "exec")


def test_nothing_names_this_machine(made: space.Space) -> None:
    here = [str(ROOT), str(Path.home()) + "/", str(made.folder)]
    for name in names(made.folder):
        content = (made.folder / name).read_bytes()
        assert not [h for h in here if h.encode() in content], name
    for name in ("requirements.txt", ENTRY, ".gitattributes"):
        assert not re.search(r"(?<![\w:/])/\w", (made.folder / name).read_text()), name


def test_the_front_matter(made: space.Space) -> None:
    head, front, body = (made.folder / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(front)
    assert (head, list(found)) == ("", KEYS)
    assert found["title"] == 'A: "race" # for {you}'
    assert (found["sdk"], found["sdk_version"]) == ("gradio", metadata.version("gradio"))
    assert f"gradio=={found['sdk_version']}" in dependencies()
    assert (found["python_version"], found["app_file"], found["license"]) == ("3.12", ENTRY, "apache-2.0")
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {found["colorFrom"], found["colorTo"]} <= colours
    assert len(found["short_description"]) <= 60  # the Hub refuses more
    assert found["fullWidth"] is True
    assert "{" not in body.replace("{you}", "")
    assert [e.id for e in zoo.entries() if f"`{e.id}`" not in body] == []
    for word in ("STUDIO_DATA", "two virtual CPUs", "not persistent", "ZeroGPU"):
        assert word in body


def test_the_pins_are_the_studios(made: space.Space) -> None:
    lines = (made.folder / "requirements.txt").read_text().splitlines()
    assert lines.count(f"--extra-index-url {TORCH_INDEX}") == 1
    pins = [line.removesuffix("+cpu") for line in lines if not line.startswith("--")]
    wanted = [d for d in dependencies() if not d.startswith("gradio==")]
    assert [p for p in pins if p.partition("==")[0] not in HELD_BACK] == [
        w for w in wanted if w.partition("==")[0] not in HELD_BACK
    ]
    assert [p.partition("==")[0] for p in pins] == [w.partition("==")[0] for w in wanted]
    assert [line for line in lines if "+cpu" in line] == [w + "+cpu" for w in wanted if w.startswith("torch==")]


def test_the_pins_agree_with_what_a_space_installs_beside_them() -> None:
    """The build of a Space asks pip for the requirements and ``gradio[oauth,mcp]`` together."""
    asked = [Requirement(r) for r in metadata.requires("gradio") or ()]
    asked = [r for r in asked if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("", "oauth", "mcp"))]

    def refused(pins: list[str]) -> set[str]:
        given = {p.partition("==")[0]: p.partition("==")[2] for p in pins if "==" in p}
        return {r.name for r in asked if r.name in given and given[r.name] not in r.specifier}

    assert refused(requirements(dependencies()).splitlines()) == set()
    assert refused(dependencies()) == set(HELD_BACK), "hold back what does not agree, and nothing else"


def test_without_a_checkout_the_distribution_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "pareto_studio-9.dist-info"
    info.mkdir()
    required = "".join(f"Requires-Dist: {d}\n" for d in dependencies()) + 'Requires-Dist: ruff==1; extra == "dev"\n'
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: pareto-studio\nVersion: 9\n{required}")
    (info / "RECORD").write_text("pareto_studio-9.dist-info/licenses/LICENSE,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(space, "ROOT", tmp_path)
    assert pinned() == dependencies()
    (info / "licenses").mkdir()
    (info / "licenses" / "LICENSE").write_text("as it is")
    assert space.licence() == "as it is"
    (info / "RECORD").write_text("")
    with pytest.raises(Unavailable, match="install it again"):
        space.licence()


# -- what is refused, and what is replaced


def test_a_folder_that_is_not_empty_is_replaced_only_if_it_is_a_space(tmp_path: Path, made: space.Space) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    for force, sentence in (
        (False, "is not empty; choose another folder, or add --force"),
        (True, "holds no Space .* choose another folder"),
    ):
        with pytest.raises(SpecError, match=sentence):
            assemble(mine, force=force)
    assert names(mine) == {"thesis.tex"}
    old = tmp_path / "old"
    shutil.copytree(made.folder, old)
    (old / "stale.py").write_text("")
    (old / ".git").mkdir()
    (old / ".git" / "HEAD").write_text("ref")
    assert assemble(old, force=True).files == made.files
    assert names(old) == names(made.folder) | {".git/HEAD"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "old"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert assemble(tmp_path / "new").files > 100


@pytest.mark.parametrize(
    ("folder", "title", "sentence"),
    [
        ("file", "T", "is a file; choose a folder"),
        ("x", " \n ", "a title of 0 characters is not allowed; give --title 1 to 100"),
        ("x", "t" * 101, "a title of 101 characters"),
        (str(ROOT / "app" / "x"), "T", "holds the studio itself, or is a part of it; choose a folder elsewhere"),
        (str(ROOT), "T", "holds the studio itself"),
        (".", "T", "is the folder that you stand in"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: str, title: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=sentence) as refused:
        assemble(Path(folder), title)
    assert explain(refused.value) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert names(tmp_path) == {"file"}


def test_half_a_space_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write the Space to .*; free it, or choose another folder"):
        assemble(tmp_path / "file" / "below")
    _, hard = usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # the weights do not fit
        with pytest.raises(StoreError, match=r"cannot write the Space to .*large"):
            assemble(tmp_path / "space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    monkeypatch.setattr(space, "ROOT", tmp_path / "nowhere")
    with pytest.raises(Unavailable, match="is missing from this installation"):
        assemble(tmp_path / "space")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_command_says_what_it_wrote(tmp_path: Path, pareto_studio, made: space.Space) -> None:
    said, wrong = pareto_studio("space", "here", "--title", "Mine", cwd=tmp_path).communicate(timeout=120)
    assert wrong == ""
    assert said.startswith(f"the Space is in {tmp_path / 'here'}: {made.files} files, ")
    assert "hf upload YOU/NAME" in said


# -- what it heeds when it starts


def test_what_the_space_is_told_by_its_variables(tmp_path: Path) -> None:
    assert read_port("8080") == 8080
    for variable, value in (
        ("GRADIO_SERVER_PORT", "eighty"), ("GRADIO_SERVER_PORT", "70000"), ("STUDIO_AUTH", "nobody"), ("STUDIO_DEVICES", " , "),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=r"cannot read .*for example"):
            start({variable: value}, HostedLimits())
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StoreError, match=r"cannot keep the runs in .*; mount a bucket there that may be written, or leave STUDIO_DATA out"
    ):
        start({"STUDIO_DATA": str(tmp_path / "file")}, HostedLimits())


def test_ended_runs_outlive_the_space(tmp_path: Path) -> None:
    bucket, first, second = tmp_path / "bucket", DataDir.at(tmp_path / "1").open(), DataDir.at(tmp_path / "2").open()
    digest = first.keep_artifact(b"a picture")
    ended, running = (SpoolWriter(first.spool(f"20260131-09450{i}-ab12cd")) for i in (1, 2))
    spec = ExperimentSpec.model_validate({"model": "fashion-vit", "workload": {"id": "classify"}})
    for writer in (ended, running):
        writer.append(Submitted(spec=spec, origin="studio"))
    ended.append(Finished(seconds=1.0))
    ended.close()
    with Keeper(first, bucket, every_s=3600) as keeper:
        assert keeper.sweep() == 2
        assert names(bucket) == {f"artifacts/{digest[:2]}/{digest}", "spool/20260131-094501-ab12cd.jsonl"}
        assert keeper.sweep() == 0
        append_entries(first.journal, [Tag(experiment="20260131-094501-ab12cd", tag="kept")])
        running.append(Note(text="on its way"))
        assert keeper.sweep() == 1
        running.append(Finished(seconds=1.0))
        running.close()
    assert len(names(bucket)) == 4  # leaving copied what ended last

    Keeper(second, bucket)
    assert second.artifact(digest).read_bytes() == b"a picture"
    assert [e.event for e in read_spool(second.spool("20260131-094502-ab12cd"))] == ["submitted", "note", "finished"]
    with Store(second) as store:
        store.flush()
        assert [row.id for row in store.experiments()] == ["20260131-094502-ab12cd", "20260131-094501-ab12cd"]
        assert store.tags() == ["kept"]
    assert not [n for n in names(bucket) if "duckdb" in n or "lock" in n]
