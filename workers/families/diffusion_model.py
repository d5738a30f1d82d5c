"""A pipeline of the library as one module, so that its weights have names, can be counted and can be replaced."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

DENOISERS = ("transformer", "unet")


class DiffusionModel(nn.Module):
    """Denoiser, text encoders and VAE under the names that the pipeline gives them.

    Attributes:
        pipeline: the library's; its parts are this module's children.
        named: class number -> name, as ``model_index.json`` has them.
        denoiser_name: ``unet`` or ``transformer``.
    """

    def __init__(self, pipeline: Any, named: Mapping[Any, str] | None = None):
        super().__init__()
        self.pipeline, self.named = pipeline, named or {}
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
        self.denoiser_name = next(n for n in DENOISERS if getattr(pipeline, n, None) is not None)

    @property
    def denoiser(self) -> Any:
        """The network that runs at every step."""
        return self.get_submodule(self.denoiser_name)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes that it draws; empty for one that reads prompts."""
        if not self.accepts("class_labels"):
            return ()
        named = {int(k): str(v).split(",")[0].strip() for k, v in self.named.items()}
        return tuple(named.get(i, str(i)) for i in range(self.classes))

    @property
    def classes(self) -> int:
        """How many classes it draws; the one that stands for no class is not counted."""
        config = self.denoiser.config
        return int(getattr(config, "num_embeds_ada_norm", None) or getattr(config, "num_class_embeds", 1) - 1)

    @property
    def conditional_first(self) -> bool:
        """Under guidance the conditional half stands first: so in the library's DiT pipeline, nowhere else."""
        return type(self.pipeline).__name__ == "DiTPipeline"

    def accepts(self, argument: str) -> bool:
        """Whether the pipeline's call knows this argument."""
        return argument in inspect.signature(self.pipeline.__call__).parameters

    def default(self, argument: str) -> Any:
        """The pipeline's own value of an argument; None where it has none."""
        found = inspect.signature(self.pipeline.__call__).parameters.get(argument)
        return None if found is None or found.default is inspect.Parameter.empty else found.default
