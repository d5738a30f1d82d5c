"""From a name to a checked model: zoo, folder, GGUF, Hub; and everything that is refused, each in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from studio_state.errors import ModelError, StudioError, Unavailable
from tests import tiny
from tests.hub_server import COMMIT
from tests.tiny_diffusion import build_pipeline
from workers.models.info import model_info
from workers.models.load import load_model
from workers.models.resolve import resolve

ROOT = Path(__file__).parents[2]


def load_everything(name: str) -> None:
    """All that an experiment does with a model before it runs."""
    resolved = resolve(name)
    model_info(resolved)
    load_model(resolved, torch.float32)


def refused(name: str | Path, error: type[StudioError] = ModelError) -> str:
    """The sentence with which a model is refused before or while it loads."""
    with pytest.raises(error) as caught:
        load_everything(str(name))
    sentence = str(caught.value)
    assert sentence
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    return sentence


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A tiny Llama that a test may break."""
    return Path(shutil.copytree(tiny.llama_folder(), tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    """Change fields of config.json; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# --- what loads


@pytest.mark.parametrize(
    ("make", "traits"),
    [
        (tiny.llama_folder, "chat-template gqa lean-shape rope"),
        (tiny.qwen3_folder, "chat-template gqa lean-shape rope tied-embeddings"),
        (tiny.mistral_folder, "chat-template gqa lean-shape rope sliding-window"),
        (tiny.gemma3_folder, "chat-template mqa rope sliding-window"),
        (tiny.gpt2_folder, "chat-template mha tied-embeddings"),
    ],
)
def test_folders_load_and_say_what_they_are(make: Callable[[], Path], traits: str) -> None:
    resolved = resolve(str(make()))
    info = model_info(resolved)
    model, tokenizer, _ = load_model(resolved, torch.float32, attn_implementation="eager")
    config = model.config
    assert (info.family, info.architecture, info.traits) == ("llm", type(model).__name__, tuple(traits.split()))
    assert (info.layers, info.hidden, info.heads, info.vocab) == (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        model.get_input_embeddings().num_embeddings,
    )
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.stored_bytes == sum(t.nbytes for t in load_file(make() / "model.safetensors").values())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "eager"
    assert tokenizer.decode(tokenizer("Kuß und 日本\n ok").input_ids) == "Kuß und 日本\n ok"


def test_a_sharded_folder_loads_the_same_weights(tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny.llama_folder())
    whole.save_pretrained(tmp_path, max_shard_size="100KB")
    tiny.tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    resolved = resolve(str(tmp_path))
    assert model_info(resolved).parameters == whole.num_parameters()
    loaded = load_model(resolved, torch.float32).model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in whole.state_dict().items())
    next(iter(tmp_path.glob("model-*.safetensors"))).unlink()
    assert "lacks 1 of its" in refused(tmp_path)


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_gguf_file_loads_through_the_same_call(by_folder: bool) -> None:
    file = tiny.gguf_llama()
    resolved = resolve(str(file.parent if by_folder else file))
    info = model_info(resolved)
    model, tokenizer, _ = load_model(resolved, torch.float32)
    assert info.traits == ("4-bit-source", "chat-template", "gqa", "lean-shape", "rope")
    assert info.note == "The weights come from a 4-bit (Q4_1) file, de-quantised."
    assert (info.licence, info.title) == ("apache-2.0", "tiny llama")
    assert info.parameters == sum(p.numel() for p in model.parameters())
    original = AutoModelForCausalLM.from_pretrained(tiny.llama_folder()).state_dict()
    for name, weight in model.state_dict().items():
        error = (weight - original[name]).norm() / original[name].norm()
        assert error < (0.1 if "proj" in name else 0.01), name  # 4-bit linears, 8-bit embedding and head, exact norms
    assert tokenizer("The secret number").input_ids == tiny.tokenizer()("The secret number").input_ids


def test_other_weights_have_another_fingerprint(copy: Path) -> None:
    """Of a local folder; a Hub commit or a zoo entry's checksum says the same and is taken where there is one."""
    first = model_info(resolve(str(copy))).fingerprint
    edit_config(copy, max_position_embeddings=99)
    assert model_info(resolve(str(copy))).fingerprint == first
    tensors = load_file(copy / "model.safetensors")
    next(iter(tensors.values()))[-1] += 1.0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    changed = model_info(resolve(str(copy))).fingerprint
    assert len(first) == len(changed) == 64
    assert changed != first
    assert model_info(resolve(str(tiny.gguf_llama()))).fingerprint not in ("", first, changed)


def test_a_tied_head_that_is_stored_as_well_counts_once(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    edit_config(copy, tie_word_embeddings=True)
    resolved = resolve(str(copy))
    assert model_info(resolved).parameters == sum(p.numel() for p in load_model(resolved, torch.float32).model.parameters())


# --- what is refused


def test_names_that_are_nothing(tmp_path: Path) -> None:
    assert "did you mean 'smollm2-135m'?" in refused("smolm2-135m")
    assert "a zoo id (smollm2-135m, " in refused("xyzzy")
    assert "no model was given" in refused("  ")
    assert "there is no file or folder" in refused(tmp_path / "missing")
    assert "there is no file or folder" in refused("missing.gguf")


def test_a_folder_without_config(tmp_path: Path) -> None:
    assert "has no config.json" in refused(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_no_json_object(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    assert "config.json" in refused(copy)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_truncated_safetensors(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    sentence = refused(copy)
    assert "model.safetensors is truncated" in sentence
    assert "again" in sentence


def test_damaged_safetensors_headers(copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:8] + b"\xff" * 40 + whole[48:])
    assert "header is damaged" in refused(copy)
    file.write_bytes(b"\xff" * 8 + whole[8:])
    assert "truncated or not a safetensors file" in refused(copy)
    file.write_bytes(whole + b"more")
    assert "damaged" in refused(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_pickles_are_never_opened(copy: Path, tmp_path: Path, name: str) -> None:
    trap = tmp_path / "opened"
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(pickle.dumps(Trap(str(trap))))
    for given in (copy, copy / name):
        assert "which can run code when it is opened" in refused(given)
    assert not trap.exists()


class Trap:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def test_architectures_that_cannot_load(copy: Path) -> None:
    edit_config(copy, model_type="llamazilla", architectures=["LlamazillaForCausalLM"])
    assert "has the architecture 'llamazilla', which transformers" in refused(copy)
    edit_config(copy, model_type=None)
    assert "names no model_type" in refused(copy)
    edit_config(copy, model_type="llama")
    assert "names the class 'LlamazillaForCausalLM'" in refused(copy)


def test_remote_code_is_not_run(copy: Path, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    (copy / "modeling_evil.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    edit_config(copy, model_type="evil", architectures=["Evil"], auto_map={"AutoConfig": "modeling_evil.EvilConfig"})
    assert "brings its own Python code for Evil, which is not run" in refused(copy)
    edit_config(
        copy, model_type="llama", architectures=["EvilForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}
    )
    assert "brings its own Python code" in refused(copy)
    edit_config(copy, architectures=["LlamaForCausalLM"])
    assert resolve(str(copy)).config.model_type == "llama"  # native class exists: loads without the code
    assert not trap.exists()


def test_weights_that_do_not_match_the_config(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp" not in k}, copy / "model.safetensors", {"format": "pt"})
    assert "lack 3 of its weights (first: model.layers.1.mlp.down_proj.weight)" in refused(copy)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    edit_config(copy, vocab_size=100)
    refused(copy)


def test_no_tokenizer(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer that can be loaded" in refused(copy)


def test_gguf_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = tiny.gguf_llama().read_bytes()
    for name, content, word in (
        ("text.gguf", b"hello", "does not start with the letters GGUF"),
        ("cut.gguf", whole[: len(whole) // 2], "truncated or damaged"),
        ("short.gguf", whole[:20], "truncated or damaged"),
        ("model-00001-of-00002.gguf", whole, "one part of a split GGUF file"),
    ):
        (tmp_path / name).write_bytes(content)
        assert word in refused(tmp_path / name)
    assert "holds 4 GGUF files" in refused(tmp_path)


def test_one_weights_file_is_not_a_model(copy: Path) -> None:
    assert "give the folder that holds it" in refused(copy / "model.safetensors")


def test_other_families_are_recognised(copy: Path, tmp_path: Path) -> None:
    from transformers import (
        BertConfig,
        BertModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "model_type": "llama", "vocab_size": 64}
    vision = {**small, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    ViTForImageClassification(ViTConfig(**small, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path / "vlm")
    build_pipeline("dit", tmp_path).rename(tmp_path / "diffusion")
    for family in ("vit", "vlm", "diffusion"):
        assert model_info(resolve(str(tmp_path / family))).family == family
    for family in ("vit", "vlm"):
        assert "has neither preprocessor_config.json" in refused(tmp_path / family, ModelError)
    BertModel(BertConfig(**small, vocab_size=64)).save_pretrained(tmp_path / "bert")
    assert "is a BertModel (bert), which is none of the families" in refused(tmp_path / "bert", Unavailable)


# --- the Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Callable[..., dict[str, str]]]:
    """Resolve names in a fresh process against a Hub on localhost; answers name -> folder or sentence."""
    served = tmp_path / "served"
    shutil.copytree(tiny.llama_folder(), served / "org" / "good")
    (served / "org" / "good" / "pytorch_model.bin").write_bytes(b"pickle")
    (served / "org" / "good" / "README.md").write_text("hello")
    (served / "org" / "pickled").mkdir()
    (served / "org" / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    (served / "org" / "gguf").mkdir()
    (served / "org" / "gguf" / "model.Q4_1.gguf").write_bytes(b"GGUF")
    (served / "org" / "closed").mkdir()
    (served / "org" / "closed" / ".gated").touch()
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "hub_server.py"), str(served)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    script = (
        "import json, sys\nfrom studio_state.errors import ModelError\nfrom workers.models.resolve import resolve\n"
        "said = []\nout = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: r = resolve(name, progress=lambda *a: said.append(a)); out[name] = f'{r.path} {r.revision}'\n"
        "    except ModelError as e: out[name] = str(e)\n"
        "print(json.dumps(out | {'said': [s[0] for s in said]}))\n"
    )

    def ask(*names: str, **environment: str) -> dict[str, str]:
        env = {
            **os.environ,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HUB_OFFLINE": "0",
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-c", script, *names], cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=120
        )
        return json.loads(done.stdout.splitlines()[-1])

    try:
        yield ask
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_the_hub_online_then_offline(hub: Callable[..., dict[str, str]]) -> None:
    first = hub("org/good", "org/good@main", "org/pickled", "org/gguf", "org/closed", "org/none", "org/good@v9")
    folder, commit = first["org/good"].split()
    assert commit == COMMIT
    assert first["org/good@main"] == first["org/good"]
    names = {p.name for p in Path(folder).iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "README.md"}
    assert "only as pickle" in first["org/pickled"]
    assert "holds GGUF files only; take one with `hf download org/gguf FILE.gguf`" in first["org/gguf"]
    assert "org/closed is gated" in first["org/closed"]
    assert "the Hub has no repository 'org/none'" in first["org/none"]
    assert "has no revision 'v9'" in first["org/good@v9"]
    assert "download" in first["said"]

    offline = hub("org/good", "org/none", HF_HUB_OFFLINE="1")
    assert offline["org/good"] == first["org/good"]
    assert offline["org/none"].startswith("org/none is not on this machine and HF_HUB_OFFLINE is set; ")
    assert "`hf download org/none`" in offline["org/none"]

    unreachable = hub("org/good", "org/none", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable["org/good"] == first["org/good"]
    assert unreachable["org/none"].startswith("org/none is not on this machine and the Hub cannot be reached (")
