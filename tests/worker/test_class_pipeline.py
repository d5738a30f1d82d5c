"""The class-conditional pipeline against sampling loops written by hand, and its folder."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from studio_state.errors import ModelError, StudioError
from workers.families.class_pipeline import ClassConditionalPipeline
from workers.models.fingerprint import fingerprint
from workers.models.info import model_info
from workers.models.load import load_model
from workers.models.resolve import resolve

NAMES = {0: "shoe", 1: "bag", 2: "shirt"}
STEPS = 4
KINDS = ("unet", "dit", "latent")
PARTS = {"unet": ["unet"], "dit": ["transformer"], "latent": ["transformer", "vae"]}


def unet(**more: Any) -> Any:
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    up = ("AttnUpBlock2D", "UpBlock2D")
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, up_block_types=up, layers_per_block=1, norm_num_groups=4,
        **{**shape, "num_class_embeds": 4, **more},
    )  # fmt: skip
    return net.eval()


def dit(**more: Any) -> Any:
    torch.manual_seed(1)
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    net = DiTTransformer2DModel(**{**shape, "in_channels": 1, "out_channels": 1, "num_embeds_ada_norm": 3, **more})
    return net.eval()


def vae(**more: Any) -> Any:
    torch.manual_seed(2)
    shape = {"latent_channels": 2, "block_out_channels": (4,), "norm_num_groups": 2}
    return AutoencoderKL(1, 1, **{**shape, "scaling_factor": 0.5, "shift_factor": 0.06, **more}).eval()


def ddim() -> Any:
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")


def pipe(kind: str, scheduler: Any = None, **more: Any) -> Any:
    parts = {"unet": unet(), "scheduler": ddim()} if kind == "unet" else {"transformer": dit(), "scheduler": flow()}
    if kind == "latent":
        parts |= {"transformer": dit(in_channels=2, out_channels=2, patch_size=1), "vae": vae()}
    out = ClassConditionalPipeline(**{**parts, "id2label": NAMES, **({"scheduler": scheduler} if scheduler else {}), **more})
    out.set_progress_bar_config(disable=True)
    return out


def flow() -> Any:
    return FlowMatchEulerDiscreteScheduler()


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def start(*numbers: int, channels: int = 1) -> torch.Tensor:
    return torch.cat([torch.randn(1, channels, 8, 8, generator=g) for g in seeds(*numbers)])


def guided_by_hand(net: Any, x: torch.Tensor, t: float, labels: list[int], null: int, guidance: float) -> torch.Tensor:
    """The guided prediction from two calls, one picture at a time."""
    rows = []
    for row, label in zip(x, labels, strict=True):
        time = torch.tensor([t])
        with_class, without = (
            net(row[None], time, class_labels=torch.tensor([c])).sample[:, : x.shape[1]] for c in (label, null)
        )
        rows.append(guidance * with_class + (1 - guidance) * without)
    return torch.cat(rows)


def ddim_by_hand(net: Any, x: torch.Tensor, labels: list[int], guidance: float) -> torch.Tensor:
    """Song et al. 2021, arXiv:2010.02502, equation 12 with sigma 0, from a predicted velocity."""
    kept = torch.cumprod(1 - ddim().betas.double(), 0)
    times = [round(1000 * (1 - i / STEPS)) - 1 for i in range(STEPS)]
    for t, after in zip(times, [*times[1:], None], strict=True):
        v = guided_by_hand(net, x, t, labels, 3, guidance)
        a = float(kept[t])
        b = 1.0 if after is None else float(kept[after])
        clean = (a**0.5 * x - (1 - a) ** 0.5 * v).clamp(-1, 1)
        noise = a**0.5 * v + (1 - a) ** 0.5 * x
        x = b**0.5 * clean + (1 - b) ** 0.5 * noise
    return (x / 2 + 0.5).clamp(0, 1)


def euler_by_hand(net: Any, x: torch.Tensor, labels: list[int], guidance: float) -> torch.Tensor:
    """Euler steps along the predicted flow; levels fall evenly from 1 to 1/1000, then to 0."""
    levels = [1 - (1 - 0.001) * i / (STEPS - 1) for i in range(STEPS)]
    for s, after in zip(levels, [*levels[1:], 0.0], strict=True):
        x = x + (after - s) * guided_by_hand(net, x, 1000 * s, labels, 3, guidance)
    return (x / 2 + 0.5).clamp(0, 1)


# -- the pictures


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("net", ["unet", "dit"])
@pytest.mark.parametrize("by", ["ddim", "flow"])
def test_pictures_equal_a_loop_written_by_hand(net: str, by: str, guidance: float) -> None:
    pipeline = pipe(net, ddim() if by == "ddim" else flow())
    labels = [2, 0, 1]
    images = pipeline(labels, guidance, STEPS, generator=seeds(5, 6, 7)).images
    with torch.no_grad():
        wanted = (ddim_by_hand if by == "ddim" else euler_by_hand)(pipeline.denoiser, start(5, 6, 7), labels, guidance)
    assert images.shape == (3, 1, 8, 8)
    assert (images.min() >= 0, images.max() <= 1) == (True, True)
    assert wanted.std() > 0.05
    torch.testing.assert_close(images, wanted, atol=2e-5, rtol=0)
    unguided = pipeline(labels, 1.0, STEPS, generator=seeds(5, 6, 7)).images
    assert torch.equal(images, unguided) == (guidance == 1)


@pytest.mark.parametrize("net", KINDS)
def test_a_picture_does_not_depend_on_its_batch(net: str) -> None:
    pipeline = pipe(net)
    together = pipeline([0, 1, 2], 2.0, STEPS, generator=seeds(1, 2, 3)).images
    apart = [pipeline([c], 2.0, STEPS, generator=seeds(s)).images for c, s in ((0, 1), (1, 2), (2, 3))]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=0)
    given = start(1, 2, 3, channels=pipeline.denoiser.config.in_channels)
    torch.testing.assert_close(together, pipeline([0, 1, 2], 2.0, STEPS, latents=given).images, atol=0, rtol=0)


@pytest.mark.parametrize("net", KINDS)
def test_one_call_a_step_with_no_class_first(net: str) -> None:
    pipeline, calls = pipe(net), []  # type: ignore[var-annotated]
    handle = pipeline.denoiser.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    pipeline([2, 0], 2.0, STEPS, generator=seeds(1, 2))
    pipeline([2, 0], 1.0, STEPS, generator=seeds(1, 2))
    handle.remove()
    assert [k["class_labels"].tolist() for _, k in calls] == [[3, 3, 2, 0]] * STEPS + [[2, 0]] * STEPS
    assert torch.equal(*calls[0][0][0].chunk(2))
    assert [k["timestep"].shape for _, k in calls] == [(4,)] * STEPS + [(2,)] * STEPS


def test_a_learned_variance_is_left_out() -> None:
    net = dit(out_channels=2)
    pipeline = pipe("dit", transformer=net)
    images = pipeline([1, 2], 2.0, STEPS, generator=seeds(1, 2)).images
    with torch.no_grad():
        wanted = euler_by_hand(net, start(1, 2), [1, 2], 2.0)
    torch.testing.assert_close(images, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_latents_are_drawn_and_decoded_as_by_hand_to_the_last_bit(guidance: float) -> None:
    pipeline = pipe("latent")
    images = pipeline([2, 0, 1], guidance, STEPS, seeds(5, 6, 7)).images
    net, x = pipeline.transformer, start(5, 6, 7, channels=2)
    levels = [*torch.tensor([1000.0, 667.0, 334.0, 1.0]) / 1000, torch.tensor(0.0)]
    with torch.no_grad():
        for s, after in pairwise(levels):
            if guidance == 1:
                flow = net(x, timestep=(1000 * s).expand(3), class_labels=torch.tensor([2, 0, 1])).sample
            else:
                labels = torch.tensor([3, 3, 3, 2, 0, 1])
                both = net(torch.cat([x, x]), timestep=(1000 * s).expand(6), class_labels=labels).sample
                flow = both[:3] + guidance * (both[3:] - both[:3])
            x = x + (after - s) * flow
        wanted = (pipeline.vae.decode(x / 0.5 + 0.06).sample / 2 + 0.5).clamp(0, 1)
        assert torch.equal(pipeline.pictures(x), wanted)
    assert torch.equal(images, wanted)
    assert images.shape == (3, 1, 8, 8)
    assert images.std() > 0.05


def test_pictures_of_a_vae_may_be_larger_and_in_colour_and_it_may_be_in_another_format() -> None:
    levels = {"block_out_channels": (4, 4), "down_block_types": ("DownEncoderBlock2D",) * 2}
    large = AutoencoderKL(3, 3, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=2, norm_num_groups=2, **levels)
    pipeline = pipe("latent", vae=large.eval())
    images = pipeline([0, 1], 2.0, 2, seeds(1, 2)).images
    assert images.shape == (2, 3, 16, 16)
    large.bfloat16()
    rounded = pipeline([0, 1], 2.0, 2, seeds(1, 2)).images
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), images, atol=0.05, rtol=0)


def test_schedulers_that_scale_and_that_draw_noise() -> None:
    images = pipe("unet", EulerDiscreteScheduler(prediction_type="v_prediction"))([0], 1.0, 3, seeds(1)).images
    assert images.isfinite().all()
    pipeline = pipe("unet", DDPMScheduler(prediction_type="v_prediction"))
    first, again, other = (pipeline([0], 1.0, 3, seeds(s)).images for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_forms_of_output_and_half_precision() -> None:
    pipeline = pipe("unet")
    tensor, numbers, pictures = (pipeline([0, 1], 1.0, 2, seeds(1, 2), output_type=o).images for o in ("pt", "np", "pil"))
    assert torch.equal(torch.from_numpy(numbers), tensor.permute(0, 2, 3, 1))
    assert [(p.size, p.mode) for p in pictures] == [((8, 8), "L")] * 2
    (alone,) = pipeline([0, 1], 1.0, 2, seeds(1, 2), return_dict=False)
    assert torch.equal(alone, tensor)
    pipeline.denoiser.bfloat16()
    assert pipeline([0, 1], 2.0, 2, seeds(1, 2)).images.dtype == torch.bfloat16
    assert pipeline([0, 1], 2.0, 2, seeds(1, 2), output_type="np").images.dtype == "float32"


# -- the callback


def test_a_callback_sees_and_changes_the_latents_and_can_stop() -> None:
    pipeline, seen = pipe("dit"), []  # type: ignore[var-annotated]

    def replace(p: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, float(t), p.num_timesteps, p.guidance_scale, sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else {}

    assert torch.equal(pipeline([0], 2.0, STEPS, seeds(1), callback_on_step_end=replace).images, torch.full((1, 1, 8, 8), 0.5))
    times = flow()
    times.set_timesteps(STEPS)
    assert seen == [(i, float(t), STEPS, 2.0, ["latents"]) for i, t in enumerate(times.timesteps)]

    def stop(p: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        p._interrupt = step == 1
        return {}

    seen.clear()
    pipeline([0], 1.0, STEPS, seeds(1), callback_on_step_end=stop)
    assert (seen, pipeline.interrupt) == ([0, 1], True)
    seen.clear()
    pipeline([0], 1.0, 2, seeds(1), callback_on_step_end=lambda *a: seen.append(a[1]) or {})
    assert (seen, pipeline.interrupt) == ([0, 1], False)


# -- the folder


@pytest.mark.parametrize("net", KINDS)
def test_the_folder_loads_again_and_draws_the_same(net: str, tmp_path: Path) -> None:
    pipeline = pipe(net)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    parts = PARTS[net]
    assert index["_class_name"] == "ClassConditionalPipeline"
    assert {index[part][0] for part in [*parts, "scheduler"]} == {"diffusers"}
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    weights = {f"{part}/{name}" for part in parts for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    assert files == {"model_index.json", "scheduler/scheduler_config.json", *weights}
    again = ClassConditionalPipeline.from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert again.config.id2label == NAMES
    assert again.components.keys() == {"unet", "transformer", "vae", "scheduler"}
    assert [p for p, found in again.components.items() if found is not None and p != "scheduler"] == parts
    drawn = [p([0, 2], 2.0, STEPS, generator=seeds(3, 4)).images for p in (pipeline, again)]
    assert torch.equal(*drawn)


def test_both_parts_of_a_latent_pipeline_tell_it_from_others(tmp_path: Path) -> None:
    """Fingerprint and bytes of a folder whose two files of weights have the same name."""
    pipeline = pipe("latent")
    pipeline.save_pretrained(tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert [f.name for f in files] == ["diffusion_pytorch_model.safetensors"] * 2
    first = model_info(resolve(str(tmp_path)))
    assert fingerprint(files) == fingerprint(files[::-1]) == first.fingerprint
    weights = [p.numel() for part in (pipeline.transformer, pipeline.vae) for p in part.parameters()]
    assert first.parameters == sum(weights)
    for part in (pipeline.transformer, pipeline.vae):
        with torch.no_grad():
            next(part.parameters())[:] += 1
        pipeline.save_pretrained(tmp_path)
        changed = model_info(resolve(str(tmp_path)))
        assert changed.fingerprint != first.fingerprint
        assert changed.stored_bytes == first.stored_bytes
        first = changed


def test_a_folder_whose_vae_does_not_fit_is_refused_when_it_loads(tmp_path: Path) -> None:
    pipe("latent").save_pretrained(tmp_path)
    vae(latent_channels=3).save_pretrained(tmp_path / "vae")
    with pytest.raises(ModelError) as caught:
        load_model(resolve(str(tmp_path)), torch.float32)
    assert str(caught.value) == (
        f"{tmp_path} cannot be loaded: this denoiser has in_channels = 2 and this vae latent_channels = 3; "
        "give two that were trained together"
    )


# -- what is refused


def refusal(call: Any) -> str:
    with pytest.raises(StudioError) as caught:
        call()
    return str(caught.value)


def test_what_is_refused() -> None:
    pipeline = pipe("unet")
    only = "a class-conditional pipeline has one denoiser; {} of unet and transformer given: give one"
    assert refusal(lambda: ClassConditionalPipeline(ddim())) == only.format("neither")
    assert refusal(lambda: ClassConditionalPipeline(ddim(), unet(), dit())) == only.format("both")
    assert "no embedding of classes" in refusal(lambda: ClassConditionalPipeline(ddim(), unet(num_class_embeds=None)))
    fits = "this denoiser has in_channels = 1 and this vae latent_channels = 2; give two that were trained together"
    assert refusal(lambda: pipe("unet", vae=vae())) == fits
    other = "the vae of a class-conditional pipeline is an AutoencoderKL; UNet2DModel given"
    assert refusal(lambda: pipe("unet", vae=unet())) == other
    assert refusal(lambda: pipeline([0, 3])) == "class 3 is not one of this model's; allowed: 0 to 2"
    assert refusal(lambda: pipe("dit")([-1])) == "class -1 is not one of this model's; allowed: 0 to 2"
    assert refusal(lambda: pipeline([])) == "no class labels given; give one a picture"
    assert refusal(lambda: pipeline([0], generator=seeds(1, 2))).startswith("2 generators for 1 class labels")
    assert refusal(lambda: pipeline([0], output_type="jpg")) == "there is no output type 'jpg'; allowed: pt, np, pil"
    assert refusal(lambda: pipeline([0], latents=torch.zeros(1, 1, 4, 4))).endswith("allowed: [1, 1, 8, 8]")
    wanted = "a callback cannot be given 'prompt'; allowed: latents"
    assert refusal(lambda: pipeline([0], callback_on_step_end_tensor_inputs=["prompt"])) == wanted
