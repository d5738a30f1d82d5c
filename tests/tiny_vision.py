"""Tiny random models that see, in real folders: seeded weights beside the processor that prepares their images.

As in :mod:`tests.tiny`: made once per process tree, byte-identical from run to run, float32. The language
models are Llamas of its shape with its tokenizer; towers have two layers that count (CLIP's third one is
not read, as in the published models).
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from tests import tiny

WIDTH = 64
VISION_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # large enough that a token depends on its patch
}
CLASSES: dict[str, Any] = {"num_labels": 10}
PLAIN: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PINPOINTS = [[64, 128], [128, 64], [128, 128]]  # LLaVA-NeXT: (height, width) of the grids of tiles

IDEFICS_TOKENS = (
    *("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
)
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def llava_folder(layers: int = 2) -> Path:
    """LLaVA: CLIP tower for 64 pixels in patches of 8 (64 image tokens), the shorter edge resized, the middle cut out.

    Args:
        layers: of the language model.
    """

    def make(folder: Path) -> Any:
        from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

        words = _tokenizer(["<image>"], "<image>\n")
        images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
        LlavaProcessor(  # type: ignore[no-untyped-call]
            images,
            words,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=words.chat_template,
        ).save_pretrained(folder)
        config = LlavaConfig(
            vision_config=_clip_tower(),
            text_config={**_llama(words), "num_hidden_layers": layers},
            image_token_index=words.convert_tokens_to_ids("<image>"),
        )
        model = LlavaForConditionalGeneration(config)
        _save_scorer(folder / "scorer", words, model.model.vision_tower)
        return model

    return _folder("llava" if layers == 2 else f"llava-{layers}", make)


def llava_next_folder() -> Path:
    """LLaVA-NeXT: the same tower on the whole image and on up to 2 x 2 tiles of it."""

    def make(folder: Path) -> Any:
        from transformers import (
            LlavaNextConfig,
            LlavaNextForConditionalGeneration,
            LlavaNextImageProcessorPil,
            LlavaNextProcessor,
        )

        words = _tokenizer(["<image>"], "<image>\n")
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_grid_pinpoints=PINPOINTS
        )
        LlavaNextProcessor(  # type: ignore[no-untyped-call]
            images,
            words,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=words.chat_template,
        ).save_pretrained(folder)
        config = LlavaNextConfig(
            vision_config=_clip_tower(),
            text_config=_llama(words),
            image_token_index=words.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=PINPOINTS,
        )
        model = LlavaNextForConditionalGeneration(config)
        _save_scorer(folder / "scorer", words, model.model.vision_tower)
        return model

    return _folder("llava-next", make)


def idefics3_folder() -> Path:
    """Idefics3: tiles of 64 pixels in patches of 8, four patches a token (16 tokens a view), the longest edge at 256."""

    def make(folder: Path) -> Any:
        from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil, Idefics3Processor

        words = _tokenizer(IDEFICS_TOKENS, "<image>")
        images = Idefics3ImageProcessorPil(size={"longest_edge": 256}, max_image_size={"longest_edge": 64})
        Idefics3Processor(images, words, image_seq_len=16, chat_template=words.chat_template).save_pretrained(folder)
        return Idefics3ForConditionalGeneration(Idefics3Config(**_idefics_shape(words)))

    return _folder("idefics3", make)


def smolvlm_folder() -> Path:
    """SmolVLM: as the Idefics3; its processor also reads videos, for which it needs packages that are not installed.

    The files are those of the published models: the image processor in ``preprocessor_config.json``, the rest apart.
    """

    def make(folder: Path) -> Any:
        from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil

        words = _tokenizer(IDEFICS_TOKENS, "<image>")
        images = SmolVLMImageProcessorPil(size={"longest_edge": 256}, max_image_size={"longest_edge": 64})
        _save_apart(folder, images, words, processor_class="SmolVLMProcessor", image_seq_len=16)
        return SmolVLMForConditionalGeneration(SmolVLMConfig(**_idefics_shape(words)))

    return _folder("smolvlm", make)


def qwen2_5_vl_folder() -> Path:
    """Qwen2.5-VL: images of their own size, patches of 8, four a token; a layer with windows of 4 tokens, then a full one."""

    def make(folder: Path) -> Any:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

        words = _tokenizer(QWEN_TOKENS, "<|vision_start|><|image_pad|><|vision_end|>")
        images = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 160 * 160})
        _save_apart(folder, images, words, processor_class="Qwen2_5_VLProcessor")
        names = ("vision_start", "vision_end", "image", "video")
        vision = {
            "depth": 2,
            "num_heads": 4,
            "hidden_size": WIDTH,
            "out_hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        }
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        config = Qwen2_5_VLConfig(
            vision_config=vision,
            text_config={**_llama(words), "model_type": "qwen2_5_vl_text", "rope_parameters": rope},
            **{f"{n}_token_id": words.convert_tokens_to_ids(t) for n, t in zip(names, QWEN_TOKENS, strict=True)},
        )
        return Qwen2_5_VLForConditionalGeneration(config)

    return _folder("qwen2.5-vl", make)


def vit_folder() -> Path:
    """ViT: any image squeezed into 32 x 32 pixels, patches of 4, ten classes."""

    def make(folder: Path) -> Any:
        from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

        ViTImageProcessorPil(size={"height": 32, "width": 32}, **PLAIN).save_pretrained(folder)
        return ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, **CLASSES, **VISION_SHAPE))

    return _folder("vit", make)


def deit_folder(teacher: bool = False) -> Path:
    """DeiT: squeezed into 36 x 36 pixels, the middle 32 of them cut out, patches of 4, ten classes.

    Args:
        teacher: the class with a second head, on the distillation token.
    """

    def make(folder: Path) -> Any:
        from transformers import (
            DeiTConfig,
            DeiTForImageClassification,
            DeiTForImageClassificationWithTeacher,
            DeiTImageProcessorPil,
        )

        size, crop_size = {"height": 36, "width": 36}, {"height": 32, "width": 32}
        DeiTImageProcessorPil(size=size, crop_size=crop_size, **PLAIN).save_pretrained(folder)
        kind = DeiTForImageClassificationWithTeacher if teacher else DeiTForImageClassification
        return kind(DeiTConfig(image_size=32, patch_size=4, **CLASSES, **VISION_SHAPE))

    return _folder("deit-teacher" if teacher else "deit", make)


def dinov2_folder(classifier: bool = False) -> Path:
    """DINOv2: the shorter edge at 64 pixels, the middle 56 cut out, patches of 7.

    Args:
        classifier: with a head of ten classes.
    """

    def make(folder: Path) -> Any:
        from transformers import BitImageProcessorPil, Dinov2Config, Dinov2ForImageClassification, Dinov2Model

        BitImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
        shape = {k: v for k, v in VISION_SHAPE.items() if k != "intermediate_size"}
        config = Dinov2Config(image_size=56, patch_size=7, mlp_ratio=2, **CLASSES, **shape)
        return (Dinov2ForImageClassification if classifier else Dinov2Model)(config)

    return _folder("dinov2-classifier" if classifier else "dinov2", make)


def clip_vision_folder() -> Path:
    """CLIP's tower alone: 64 pixels in patches of 8, as in :func:`llava_folder`."""

    def make(folder: Path) -> Any:
        from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(folder)
        return CLIPVisionModel(CLIPVisionConfig(**_clip_tower()))

    return _folder("clip-vision", make)


def processor_of(folder: Path) -> Any:
    """Tokenizer and image processor of a folder in one, without what its class would need for videos."""
    from transformers import AutoProcessor, Idefics3Processor, Qwen2_5_VLProcessor

    class QwenWithoutVideos(Qwen2_5_VLProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    without_videos: dict[str, Any] = {"smolvlm": Idefics3Processor, "qwen2_5_vl": QwenWithoutVideos}
    return without_videos.get(kind, AutoProcessor).from_pretrained(folder, local_files_only=True)


def _clip_tower() -> dict[str, Any]:
    shape = {k: v for k, v in VISION_SHAPE.items() if k != "initializer_range"}  # CLIP scales by the width instead
    return {**shape, "num_hidden_layers": 3, "model_type": "clip_vision_model", "image_size": 64, "patch_size": 8}


def _save_scorer(folder: Path, words: Any, tower: Any) -> None:
    """A CLIP model with this tower and a text tower of one layer; a text ends with the mark of an image, where CLIP reads it off."""
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPConfig, CLIPModel

    end = words.convert_tokens_to_ids("<image>")
    text = {
        "vocab_size": len(words),
        "num_hidden_layers": 1,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": end,
        "pad_token_id": 0,
    }
    shape = {k: VISION_SHAPE[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = CLIPConfig(text_config={**text, **shape}, vision_config=tower.config.to_dict(), projection_dim=32)
    clip = CLIPModel(config)
    clip.vision_model.load_state_dict(tower.state_dict())
    clip.save_pretrained(folder)
    ready = copy.deepcopy(words)
    ready.chat_template = None
    ready.backend_tokenizer.post_processor = TemplateProcessing(single="$A <image>", special_tokens=[("<image>", end)])
    ready.save_pretrained(folder)


def _llama(words: Any) -> dict[str, Any]:
    ids = {f"{n}_token_id": getattr(words, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    return {**tiny.LLAMA_SHAPE, "model_type": "llama", "tie_word_embeddings": False, "vocab_size": len(words), **ids}


def _idefics_shape(words: Any) -> dict[str, Any]:
    return {
        "vision_config": {**VISION_SHAPE, "image_size": 64, "patch_size": 8},
        "text_config": _llama(words),
        "scale_factor": 2,
        "image_token_id": words.convert_tokens_to_ids("<image>"),
        "pad_token_id": words.pad_token_id,
    }


def _tokenizer(tokens: Any, image: str) -> Any:
    """The text models' tokenizer with tokens added and a template in which ``image`` stands for an image part."""
    words = copy.deepcopy(tiny.tokenizer())
    words.add_special_tokens({"extra_special_tokens": list(tokens)})
    words.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{{{{ {image!r} }}}}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return words


def _save_apart(folder: Path, images: Any, words: Any, **fields: Any) -> None:
    """The files of a processor that cannot itself be made here."""
    images.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(fields, indent=2))


def _folder(name: str, make: Callable[[Path], Any]) -> Path:
    """Make the model once; other processes wait for it.

    Args:
        make: saves the processor into the folder it is given and returns the model, whose weights are saved with it.
    """
    stamp = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    home = tiny.root() / f"{name}-{stamp}"
    if home.exists():
        return home
    tiny.root().mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if not home.exists():
            import torch

            draft = Path(tempfile.mkdtemp(dir=tiny.root()))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                make(draft).save_pretrained(draft)
            draft.rename(home)
    return home
