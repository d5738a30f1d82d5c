"""Pictures of a class: the studio's own pipeline in the library's form, over a UNet or a diffusion transformer.

The library has a pipeline of this kind for one model only (``DiTPipeline``: transformer and VAE, 1,000 classes).

Shapes: B pictures, C channels, H x W of the denoiser's sample; under guidance the denoiser gets [2B, C, H, W]. With a VAE
that sample is of latents, and pictures have the channels and the size that the VAE gives them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from studio_state.errors import StudioError

Base: Any = DiffusionPipeline  # which has no types
OUTPUTS = ("pt", "np", "pil")


class ClassConditionalPipeline(Base):  # type: ignore[misc]
    """Draw pictures of classes from noise, with classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, section 3.2).

    Args:
        scheduler: steps from noise to picture.
        unet: denoiser with an embedding of classes, whose last row stands for no class.
        transformer: denoiser in the place of ``unet``; its row ``num_embeds_ada_norm`` stands for no class.
        vae: decodes what the denoiser draws, divided by the VAE's ``scaling_factor`` and moved by its ``shift_factor``
            (Rombach et al. 2022, arXiv:2112.10752, appendix G); without one the denoiser works on pixels from -1 to 1.
        id2label: class -> name; kept in ``model_index.json``.

    Raises:
        StudioError: both or none of the two denoisers, a UNet without an embedding of classes, or a VAE of another kind
            or of other latents than the denoiser's.
    """

    model_cpu_offload_seq = "unet->transformer->vae"
    _optional_components = ["unet", "transformer", "vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        scheduler: SchedulerMixin,
        unet: UNet2DModel | None = None,
        transformer: DiTTransformer2DModel | None = None,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | None = None,
    ):
        super().__init__()
        if (unet is None) == (transformer is None):
            given = "neither" if unet is None else "both"
            raise StudioError(f"a class-conditional pipeline has one denoiser; {given} of unet and transformer given: give one")
        self.register_modules(unet=unet, transformer=transformer, vae=vae, scheduler=scheduler)
        if unet is not None and self.unet.config.num_class_embeds is None:
            raise StudioError("this unet has no embedding of classes; give one whose num_class_embeds is the classes + 1")
        self._check_vae()
        self.register_to_config(id2label=None if id2label is None else {int(k): v for k, v in id2label.items()})
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False

    @property
    def denoiser(self) -> Any:
        """The UNet or the transformer."""
        return self.transformer if self.unet is None else self.unet

    @property
    def null_class(self) -> int:
        """The label that stands for no class; those below it are the classes."""
        config = self.denoiser.config
        return int(config.num_embeds_ada_norm if self.unet is None else config.num_class_embeds - 1)

    @property
    def guidance_scale(self) -> float:
        """Of the running or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the denoiser gets every picture twice."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the running or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the steps that are left are skipped; a callback sets ``_interrupt``."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 1.5,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture a label.

        Args:
            class_labels: B classes.
            guidance_scale: above 1 the prediction is moved away from the one for no class, by this factor.
            num_inference_steps: denoising steps.
            generator: of the noise; a list has one a picture, so that a picture does not depend on its batch.
            latents: [B, C, H, W] noise to start from, in the place of the generator's.
            output_type: ``pt`` [B, channels, height, width], ``np`` [B, height, width, channels], both from 0 to 1, or ``pil``.
            callback_on_step_end: (pipeline, step, timestep, tensors by name) -> tensors to go on with, by name.
            callback_on_step_end_tensor_inputs: which tensors the callback is given: ``latents``.

        Raises:
            StudioError: a label that is no class, or an argument that does not fit.
        """
        labels = self._checked(class_labels, generator, output_type, callback_on_step_end_tensor_inputs)
        self._guidance_scale, self._interrupt = guidance_scale, False
        device, dtype, guided = self._execution_device, self.denoiser.dtype, self.do_classifier_free_guidance
        asked = torch.tensor(labels, device=device)
        if guided:
            asked = torch.cat([torch.full_like(asked, self.null_class), asked])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        latents = self._noise(len(labels), generator, latents, dtype, device)
        more = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        with self.progress_bar(total=self._num_timesteps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                taken = torch.cat([latents] * 2) if guided else latents
                if hasattr(self.scheduler, "scale_model_input"):
                    taken = self.scheduler.scale_model_input(taken, t)
                predicted = self.denoiser(taken, timestep=t.expand(len(taken)), class_labels=asked, return_dict=False)[0]
                predicted = predicted[:, : latents.shape[1]]  # what follows is a learned variance
                if guided:
                    without, conditional = predicted.chunk(2)
                    predicted = without + guidance_scale * (conditional - without)
                latents = self.scheduler.step(predicted, t, latents, **more, return_dict=False)[0]
                if callback_on_step_end is not None:
                    told = {name: latents for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, i, t, told) or {}).pop("latents", latents)
                bar.update()
        images = self._images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # type: ignore[no-untyped-call]

    def _checked(self, class_labels: Sequence[int], generator: Any, output_type: str, told: Sequence[str]) -> list[int]:
        """The labels as whole numbers, once every argument fits."""
        labels = [int(label) for label in class_labels]
        if not labels:
            raise StudioError("no class labels given; give one a picture")
        if wrong := [label for label in labels if not 0 <= label < self.null_class]:
            raise StudioError(f"class {wrong[0]} is not one of this model's; allowed: 0 to {self.null_class - 1}")
        if isinstance(generator, list) and len(generator) != len(labels):
            raise StudioError(f"{len(generator)} generators for {len(labels)} class labels; give one a picture, or a single one")
        if output_type not in OUTPUTS:
            raise StudioError(f"there is no output type {output_type!r}; allowed: {', '.join(OUTPUTS)}")
        if other := [name for name in told if name not in self._callback_tensor_inputs]:
            raise StudioError(f"a callback cannot be given {other[0]!r}; allowed: {', '.join(self._callback_tensor_inputs)}")
        return labels

    def _noise(self, rows: int, generator: Any, latents: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What the steps start from [B, C, H, W], as loud as the scheduler wants it."""
        config = self.denoiser.config
        size = config.sample_size
        shape = (rows, config.in_channels, *((size, size) if isinstance(size, int) else size))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise StudioError(f"latents of shape {list(latents.shape)} do not fit; allowed: {list(shape)}")
        scale: float = getattr(self.scheduler, "init_noise_sigma", 1.0)
        return latents.to(device, dtype) * scale

    def _check_vae(self) -> None:
        """Refuse a VAE whose latents are not what the denoiser draws."""
        vae: Any = self.vae
        if vae is None:
            return
        if not isinstance(vae, AutoencoderKL):
            raise StudioError(f"the vae of a class-conditional pipeline is an AutoencoderKL; {type(vae).__name__} given")
        drawn, decoded = self.denoiser.config.in_channels, self.vae.config.latent_channels
        if drawn != decoded:
            raise StudioError(
                f"this denoiser has in_channels = {drawn} and this vae latent_channels = {decoded}; give two that were trained together"
            )

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """What latents [B, C, H, W] look like, finished or on the way: pictures from 0 to 1 [B, channels, height, width]."""
        if self.vae is not None:
            config = self.vae.config
            scaled = latents.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
            latents = self.vae.decode(scaled, return_dict=False)[0]
        return (latents / 2 + 0.5).clamp(0, 1)

    def _images(self, latents: Tensor, output_type: str) -> Any:
        """The finished latents as pictures of this type."""
        images = self.pictures(latents)
        if output_type == "pt":
            return images
        numbers = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(numbers) if output_type == "pil" else numbers
