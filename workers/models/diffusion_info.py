"""What is known of a diffusion pipeline from its configs, before weights load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workers.models.pipeline_folder import OWN, components, part_config
from workers.models.weights_files import StoredTensor

CLASS_PIPELINES = (OWN, "DiTPipeline")


def diffusion_facts(name: str, folder: Path, index: dict[str, Any], tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """Fields of :class:`~studio_state.experiment.ModelInfo`: sizes and traits; ``context`` = positions that the denoiser works on.

    ``unet`` or ``dit``: kind of denoiser; ``flow``: flow matching; ``latent``: it draws latents that a VAE decodes;
    ``class-conditional`` or ``text-conditional``: what it is asked with; ``guided``: it can run with
    classifier-free guidance; ``joint-attention``: words and picture attend to each other in one attention.
    """
    parts = components(name, index)
    denoiser = "transformer" if "transformer" in parts else "unet"
    config, scheduler = part_config(folder, denoiser), parts["scheduler"][1]
    by_class = index["_class_name"] in CLASS_PIPELINES
    traits = {
        "unet": denoiser == "unet",
        "dit": denoiser == "transformer",
        "flow": scheduler.startswith("FlowMatch"),
        "latent": "vae" in parts,
        "class-conditional": by_class,
        "text-conditional": not by_class,
        "joint-attention": "joint_attention_dim" in config,
        "guided": not config.get("guidance_embeds", False),
    }
    heads, head_dim = config.get("num_attention_heads"), config.get("attention_head_dim")
    layers = config.get("num_layers") or len(config.get("down_block_types") or ())
    widths = config.get("block_out_channels") or ()
    edge, patch = config.get("sample_size") or 0, config.get("patch_size") or 1
    edge = edge if isinstance(edge, int) else max(edge)
    given = {
        "context": (edge // patch) ** 2 if denoiser == "transformer" else edge**2,
        "layers": layers,
        "hidden": heads * head_dim if isinstance(heads, int) and isinstance(head_dim, int) and denoiser == "transformer" else 0,
        "heads": heads if isinstance(heads, int) and denoiser == "transformer" else 0,
        "head_dim": head_dim if isinstance(head_dim, int) and denoiser == "transformer" else 0,
        "parameters": sum(t.elements for t in tensors.values()),
        "traits": tuple(sorted(t for t, holds in traits.items() if holds)),
    }
    if widths and denoiser == "unet":
        given["hidden"] = max(widths)
    return given | {"ffn": 4 * given["hidden"]}
