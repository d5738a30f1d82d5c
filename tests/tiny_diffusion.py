"""Tiny random diffusion pipelines, the library's and the studio's over a VAE, saved as the folders that people have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from workers.families.class_pipeline import ClassConditionalPipeline

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "blue", "boat", "house", "of", "the", "on", "in")


def words() -> Any:
    """A tokenizer of whole words for every text encoder here."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


def clip_text(projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=0,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_text() -> Any:
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def vae(channels: int = 4, **other: Any) -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        **other,
    )


def dit(scheduler: Any = None) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=1000,
    )
    return diffusers.DiTPipeline(
        transformer=stirred(transformer),
        vae=vae(),
        scheduler=scheduler or diffusers.DDIMScheduler(),
        id2label={0: "boat", 1: "house"},
    )


def stable_diffusion() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    return diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=words(),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixart() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    return diffusers.PixArtAlphaPipeline(
        transformer=stirred(transformer),
        vae=vae(),
        text_encoder=t5_text(),
        tokenizer=words(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def sd3() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=stirred(transformer),
        vae=vae(shift_factor=0.06),
        text_encoder=clip_text(projected=True),
        text_encoder_2=clip_text(projected=True),
        text_encoder_3=None,
        tokenizer=words(),
        tokenizer_2=words(),
        tokenizer_3=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def flux() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        transformer=stirred(transformer),
        vae=vae(shift_factor=0.06),
        text_encoder=clip_text(),
        text_encoder_2=t5_text(),
        tokenizer=words(),
        tokenizer_2=words(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def own_latent() -> Any:
    """Flow matching over latents [B, 4, 8, 8], a position a token; three classes, and the fourth row for none."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=3,
    )
    return ClassConditionalPipeline(
        transformer=stirred(transformer),
        vae=vae(scaling_factor=0.5, shift_factor=0.06),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        id2label={0: "boat", 1: "house", 2: "tree"},
    )


def stirred(model: Any) -> Any:
    """Transformers of this kind start as zero maps (their gates and last layer are zero); random weights let them do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if not bool(weight.any()):
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


BUILDERS: dict[str, Callable[[], Any]] = {
    "dit": dit,
    "stable-diffusion": stable_diffusion,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "own-latent": own_latent,
}


def build_pipeline(kind: str, folder: Path) -> Path:
    """Save a tiny pipeline of this kind; kept where it is already there."""
    path = folder / kind
    if not (path / "model_index.json").is_file():
        BUILDERS[kind]().save_pretrained(path)
    return path
