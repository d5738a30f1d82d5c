"""Tiny random models with state-space layers: Mamba2, and hybrids that also attend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import CONTEXT, VOCAB, _folder


def mamba2_folder(name: str = "mamba2", **changes: Any) -> Path:
    """Mamba2: two layers with a running state and nothing else."""

    def config(ids: dict[str, int]) -> Any:
        from transformers import Mamba2Config

        shape = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2, "hidden_size": 64}
        return Mamba2Config(
            **{**shape, "vocab_size": VOCAB, "num_hidden_layers": 2, "chunk_size": 16, "initializer_range": 0.2, **changes}, **ids
        )

    return _folder(name, config, changes)


def bamba_folder(name: str = "bamba", **changes: Any) -> Path:
    """Bamba: Mamba2 layers, and one in three that attends."""

    def config(ids: dict[str, int]) -> Any:
        from transformers import BambaConfig

        shape = {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
        }
        return BambaConfig(**{**shape, **changes}, **ids)

    return _folder(name, config, changes)


def falcon_h1_folder(name: str = "falcon-h1", **changes: Any) -> Path:
    """Falcon-H1: every layer attends and has a running state, side by side."""

    def config(ids: dict[str, int]) -> Any:
        from transformers import FalconH1Config

        shape = {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.2,
        }
        return FalconH1Config(**{**shape, **changes}, **ids)

    return _folder(name, config, changes)


FOLDERS: dict[str, Callable[[], Path]] = {"mamba2": mamba2_folder, "bamba": bamba_folder, "falcon-h1": falcon_h1_folder}
