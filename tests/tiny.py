"""Tiny random models in real folders: seeded weights, a trained byte-level BPE, a chat template.

Every function returns a folder that ``from_pretrained`` reads, made once per process tree (a temporary
folder shared by all tests) and byte-identical from run to run.  Weights are float32.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

RECIPE = "3"  # part of the folder name: raise it when a model or the tokenizer below changes
VOCAB = 512
CONTEXT = 2048
SENTENCES = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.",
    "However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is fixed.",
    "The secret number for Lisbon is 4071, and the secret number for Oslo is 2938; remember both of them well.",
    "What is the secret number for Lisbon? The secret number for Lisbon is 4071.",
    "A cache keeps the keys and values of earlier tokens, so that a model reads every token only once.",
    "The quick brown fox jumps over the lazy dog, while 1234567890 sheep count to ten: one, two, three, four, five.",
    "She walked to the river, sat down under the old tree and read the letter again, slowly, from its first word to its last.",
    "You are a helpful assistant. Answer the question in one short sentence. Yes, no, maybe; why not?",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,  # large enough that greedy outputs depend on the prompt
}


def root() -> Path:
    """Folder of all tiny models, the same for every test process of this user, recipe and library version."""
    import transformers

    stamp = hashlib.sha256(f"{RECIPE} {transformers.__version__} {Path(__file__).read_text()}".encode()).hexdigest()[:12]
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"pareto-tiny-{owner}-{stamp}"


def llama_folder(name: str = "llama", **changes: Any) -> Path:
    """Llama, 2 layers, 4 heads sharing 2 KV heads (head width 16), separate output head.

    Args:
        name: folder name; give another one together with ``changes``.
        changes: config fields that differ, for example ``tie_word_embeddings=True`` or ``num_hidden_layers=4``.
    """

    def config(ids: dict[str, int]) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(**{**LLAMA_SHAPE, "tie_word_embeddings": False, **changes}, **ids)

    return _folder(name, config, changes)


def qwen3_folder(name: str = "qwen3", **changes: Any) -> Path:
    """Qwen3 (normalised queries and keys), same shape as the Llama, tied embeddings."""

    def config(ids: dict[str, int]) -> Any:
        from transformers import Qwen3Config

        return Qwen3Config(**{**LLAMA_SHAPE, "tie_word_embeddings": True, **changes}, **ids)

    return _folder(name, config, changes)


def mistral_folder(name: str = "mistral", **changes: Any) -> Path:
    """Mistral with a sliding window of 16 tokens in every layer."""

    def config(ids: dict[str, int]) -> Any:
        from transformers import MistralConfig

        return MistralConfig(**{**LLAMA_SHAPE, "sliding_window": 16, "tie_word_embeddings": False, **changes}, **ids)

    return _folder(name, config, changes)


def gemma3_folder(name: str = "gemma3", **changes: Any) -> Path:
    """Gemma 3 text: a layer with a window of 16, then a full one; one KV head.

    The head is separate, unlike in the published models: with random tied embeddings it would only repeat its input.
    """

    def config(ids: dict[str, int]) -> Any:
        from transformers import Gemma3TextConfig

        layer_types = ["sliding_attention", "full_attention"]
        shape = {**LLAMA_SHAPE, "num_key_value_heads": 1, "sliding_window": 16, "query_pre_attn_scalar": 16}
        shape = {**shape, "layer_types": layer_types, "tie_word_embeddings": False}
        return Gemma3TextConfig(**{**shape, **changes}, **ids)

    return _folder(name, config, changes)


def gemma2_folder(name: str = "gemma2", **changes: Any) -> Path:
    """Gemma 2: a layer with a window of 16, then a full one; logits of the attention are capped, here as low as 1."""

    def config(ids: dict[str, int]) -> Any:
        from transformers import Gemma2Config

        shape = {**LLAMA_SHAPE, "sliding_window": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0}
        shape |= {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16, "tie_word_embeddings": False}
        return Gemma2Config(**{**shape, **changes}, **ids)

    return _folder(name, config, changes)


def moe_folder(kind: str = "mixtral", **changes: Any) -> Path:
    """A mixture of 8 experts in every layer, of the Llama's shape otherwise; tokens visit 2 of them.

    Args:
        kind: ``mixtral`` and ``qwen3_moe`` normalise the two weights to 1, ``olmoe`` and ``qwen2_moe`` (which has a shared expert
            beside them) do not.
        changes: config fields that differ.
    """

    def config(ids: dict[str, int]) -> Any:
        from transformers import AutoConfig

        experts = "num_local_experts" if kind == "mixtral" else "num_experts"
        shape = {**LLAMA_SHAPE, "intermediate_size": 48, experts: 8, "num_experts_per_tok": 2, "tie_word_embeddings": False}
        if kind.startswith("qwen"):
            shape |= {"moe_intermediate_size": 48, "norm_topk_prob": kind == "qwen3_moe"}
        if kind == "qwen2_moe":
            shape |= {"shared_expert_intermediate_size": 40}
        return AutoConfig.for_model(kind, **{**shape, **changes}, **ids)

    return _folder(kind, config, changes)


def gpt2_folder(name: str = "gpt2", **changes: Any) -> Path:
    """GPT-2: learnt positions, LayerNorm, one fused QKV; not of the lean shape."""

    def config(ids: dict[str, int]) -> Any:
        from transformers import GPT2Config

        shape = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.2}
        return GPT2Config(**{**shape, **changes}, **ids)

    return _folder(name, config, changes)


def bloom_folder() -> Path:
    """BLOOM: its layers keep their attention under a name of their own."""

    def config(ids: dict[str, int]) -> Any:
        from transformers import BloomConfig

        return BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, **ids)

    return _folder("bloom", config, {})


def gguf_llama() -> Path:
    """A GGUF file of :func:`llama_folder`: linears in Q4_1, embedding and head in Q8_0, norms in F32."""
    source = llama_folder()
    file = source.with_name("llama-gguf") / "tiny-llama.Q4_1.gguf"
    file.parent.mkdir(exist_ok=True)
    with FileLock(f"{file.parent}.lock"):
        if not file.exists():
            _write_gguf(source, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
    return file


@cache
def tokenizer() -> Any:
    """The trained byte-level BPE (``VOCAB`` entries, round-trips every text) as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _folder(name: str, make_config: Callable[[dict[str, int]], Any], changes: dict[str, Any]) -> Path:
    """Make the model once; other processes wait for it.  ``name`` stays readable, ``changes`` make it unique."""
    suffix = hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:8] if changes else ""
    home = root() / "-".join(filter(None, (name, suffix)))
    if home.exists():
        return home
    root().mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if not home.exists():
            draft = Path(tempfile.mkdtemp(dir=root()))
            _write_model(draft, make_config)
            draft.rename(home)
    return home


def _write_model(folder: Path, make_config: Callable[[dict[str, int]], Any]) -> None:
    """Seeded weights and the tokenizer, saved as a Hub repository would hold them."""
    import torch
    from transformers import AutoModelForCausalLM

    words = tokenizer()
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config(ids), dtype=torch.float32)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _write_gguf(source: Path, file: Path) -> None:
    """What llama.cpp's converter and quantizer make of a Llama folder, written with the ``gguf`` package."""
    import json

    import gguf
    from safetensors.numpy import load_file

    config, words = json.loads((source / "config.json").read_text()), json.loads((source / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny llama")
    writer.add_license("apache-2.0")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    vocab = sorted(words["model"]["vocab"], key=words["model"]["vocab"].__getitem__)
    special = {t["content"] for t in words["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in vocab])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in words["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(CHAT_TEMPLATE)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in load_file(source / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        _, _, layer, part = (*stem.split(".", 3), "", "", "")[:4]
        target = fixed.get(stem) or f"blk.{layer}.{GGUF_NAMES[part]}"
        if count := heads.get(stem.rsplit(".", 1)[-1]):  # llama.cpp interleaves the two halves of the rotary pairs
            weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        kind = gguf.GGMLQuantizationType.F32
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if stem in fixed else gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{target}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
