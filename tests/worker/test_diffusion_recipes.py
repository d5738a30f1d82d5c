"""The diffusion recipes on toys: their lessons by hand, stopped and taken up again, and what they hand over."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from safetensors.torch import load_file
from torch import nn

from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.pipeline import Pipeline, parse_pipeline
from studio_state.results import results_of
from workers.data.fashion import CLASSES, held_out, read_split
from workers.engine import run
from workers.families.class_pipeline import ClassConditionalPipeline
from workers.models.picture_judge import judge_of
from workers.recipe import Trained, make_recipe
from workers.session import Cancelled
from workers.training.autoencoder_lessons import autoencoder_loss, divergence, latents_of, reconstruction_psnr
from workers.training.class_agreement import sample_and_judge, shares
from workers.training.diffusion_lessons import batch_of, flow_loss, pictures, round_weights, v_loss
from workers.training.loop import TrainingRun

TOYS: dict[str, dict[str, Any]] = {
    "fashion-unet": {"steps": 2, "batch_size": 4, "width": 8},
    "fashion-dit": {"steps": 2, "batch_size": 4, "width": 32, "layers": 1},
    "fashion-latent": {
        "steps": 2, "batch_size": 4, "width": 32, "layers": 1, "autoencoder_steps": 2, "autoencoder_width": 8,
    },
}  # fmt: skip
GUIDANCE = {"fashion-unet": 1.5, "fashion-dit": 1.5, "fashion-latent": 5.0}  # of the pictures that are scored
PARTS = {"fashion-unet": ["unet"], "fashion-dit": ["transformer"], "fashion-latent": ["transformer", "vae"]}
STOPS = {  # the question at which each of several attempts is stopped; a question before each step and each batch of pictures
    "fashion-unet": (1, 1),  # after the first step; trained to the end, before it scores
    "fashion-dit": (1, 1),
    "fashion-latent": (1, 1, 2, 3),  # in the VAE; before it encodes; in the transformer; while it scores
}
LAST = {
    "fashion-unet": ["scoring: 0 of 10 pictures"],
    "fashion-dit": ["scoring: 0 of 10 pictures"],
    "fashion-latent": ["encoding: 0 of 50 pictures", "scoring: 0 of 10 pictures", "decoding: 0 of 12 pictures"],
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training files in the published form, from the images that ship with the studio."""
    folder = tmp_path_factory.mktemp("fashion")
    for name, values in zip(("images-idx3", "labels-idx1"), held_out(), strict=True):
        few = values[:50]
        head = bytes([0, 0, 8, few.ndim]) + struct.pack(f">{few.ndim}I", *few.shape)
        (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(head + few.tobytes()))
    return folder


def train(name: str, data: Path, out: Path, stop_at: int | None = None, seed: int = 0) -> tuple[Trained, list[str]]:
    """Train a toy, cancelled at the so-manieth question whether to go on; also what it told."""
    asked, told = itertools.count(), []  # type: itertools.count[int], list[str]
    run = TrainingRun(out, seed, lambda text, done: told.append(text), lambda: next(asked) == stop_at, examples=12)
    return make_recipe(name, {**TOYS[name], "data": str(data)}).train(run), told


def bits(name: str, out: Path) -> list[bytes]:
    return [(out / part / WEIGHTS).read_bytes() for part in PARTS[name]]


@pytest.fixture(scope="module", params=list(TOYS))
def whole(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Trained]:
    """A recipe, the folder of its toy that was never interrupted, and what it handed over."""
    out = tmp_path_factory.mktemp(request.param)
    return request.param, out, train(request.param, data, out)[0]


# -- the lessons


class Told(nn.Module):
    """Answers with zeros, and remembers what it was asked."""

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        self.x, self.timestep, self.labels = x, timestep, class_labels
        return (torch.zeros_like(x),)


def test_the_velocity_lesson_is_the_schedulers_own() -> None:
    net, noise = Told(), make_recipe("fashion-unet", {}).scheduler()  # type: ignore[attr-defined]
    x = torch.linspace(-1, 1, 6 * 784).view(6, 1, 28, 28)
    loss = v_loss(net, noise, x, torch.arange(6), np.random.default_rng(3))
    again = np.random.default_rng(3)
    steps = torch.from_numpy(again.integers(0, 1000, 6))
    e = torch.from_numpy(again.standard_normal((6, 1, 28, 28), dtype=np.float32))
    assert torch.equal(net.timestep, steps)
    torch.testing.assert_close(net.x, noise.add_noise(x, e, steps))
    torch.testing.assert_close(loss, noise.get_velocity(x, e, steps).pow(2).mean())


def test_the_flow_lesson_leads_back_to_the_picture() -> None:
    net = Told()
    x = torch.linspace(-1, 1, 500 * 784).view(500, 1, 28, 28)
    loss = flow_loss(net, x, torch.zeros(500), np.random.default_rng(3))
    level = (net.timestep / 1000).view(-1, 1, 1, 1)
    flow = (net.x - x) / level  # x_s = x + s (e - x)
    torch.testing.assert_close(loss, flow.pow(2).mean(), atol=1e-3, rtol=1e-3)
    normal = torch.logit(net.timestep / 1000)
    assert abs(float(normal.mean())) < 0.15
    assert abs(float(normal.std()) - 1) < 0.1
    e = flow + x
    assert abs(float(e.std()) - 1) < 0.01


def test_labels_are_hidden_and_pictures_are_not_mirrored() -> None:
    images, labels = held_out()
    x, shown = batch_of(images, labels, 4000, 10, 0.25, np.random.default_rng(0))
    assert x.shape == (4000, 1, 28, 28)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert abs(float((shown == 10).float().mean()) - 0.25) < 0.03
    rows = np.random.default_rng(0).integers(0, len(images), 4000)
    assert torch.equal(x, pictures(images[rows]))
    is_shown = shown != 10
    assert torch.equal(shown[is_shown], torch.from_numpy(labels[rows].astype(np.int64))[is_shown])
    assert 10 not in batch_of(images, labels, 4000, 10, 0.0, np.random.default_rng(0))[1]
    latents = torch.arange(len(images))[:, None, None, None].expand(-1, 4, 7, 7)
    drawn, hidden = batch_of(latents, labels, 4000, 10, 0.25, np.random.default_rng(0))
    assert torch.equal(drawn[:, 3, 6, 6], torch.from_numpy(rows))
    assert torch.equal(hidden, shown)


class Known:
    """An autoencoder of two numbers a picture, its mean and log variance; it decodes the first number as grey."""

    def __init__(self, mean: float, log_variance: float):
        self.mean, self.log_variance, self.seen = mean, log_variance, torch.empty(0)

    def encode(self, x: torch.Tensor) -> Any:
        both = torch.tensor([self.mean, 2 * self.mean, self.log_variance, self.log_variance])
        given = both.view(1, 4, 1, 1).expand(len(x), -1, -1, -1)
        return AutoencoderKLOutput(DiagonalGaussianDistribution(given))

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        self.seen = latents
        return (latents[:, :1].expand(-1, -1, 28, 28),)


def test_the_lesson_of_the_vae_by_hand() -> None:
    """Latents are drawn around the mean; the error is absolute; the divergence is the one of two normal distributions."""
    vae, x = Known(0.5, -2.0), torch.zeros(3, 1, 28, 28)
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((3, 2, 1, 1), dtype=np.float32))
    spread = math.exp(-1.0)
    wanted = torch.tensor([0.5, 1.0]).view(1, 2, 1, 1) + spread * noise
    error = float(autoencoder_loss(vae, x, 0.0, np.random.default_rng(3)))
    torch.testing.assert_close(vae.seen, wanted)
    assert error == pytest.approx(float(wanted[:, 0].abs().mean()))
    nats = sum(
        float(torch.distributions.kl_divergence(torch.distributions.Normal(m, spread), torch.distributions.Normal(0.0, 1.0)))
        for m in (0.5, 1.0)
    )
    assert float(autoencoder_loss(vae, x, 0.25, np.random.default_rng(3))) == pytest.approx(error + 0.25 * nats)
    assert float(divergence(torch.zeros(2, 4, 7, 7), torch.zeros(2, 4, 7, 7))) == 0


def test_the_error_of_decoded_pictures_by_hand() -> None:
    """Grey 0.25 of 1 where every pixel is black: -20 log10(0.25) decibels; white: 0.75 off; the mean over pictures."""
    images = np.stack([np.zeros((28, 28), np.uint8), np.full((28, 28), 255, np.uint8)])
    told: list[str] = []
    decibels = reconstruction_psnr(Known(-0.5, 0.0), images, lambda text, done: told.append(text))
    assert decibels == pytest.approx(-10 * (math.log10(0.25) + math.log10(0.75)), abs=1e-4)
    assert told == ["decoding: 0 of 2 pictures"]
    latents = latents_of(Known(0.5, 3.0), images, lambda text, done: told.append(text))
    assert torch.equal(latents, torch.tensor([0.5, 1.0]).view(1, 2, 1, 1).expand(2, -1, -1, -1))
    assert told[1:] == ["encoding: 0 of 2 pictures"]


@pytest.mark.parametrize(("name", "shape"), [("fashion-dit", (1, 28, 28)), ("fashion-latent", (4, 7, 7))])
def test_the_transformer_starts_at_zero_and_hides_no_label_itself(name: str, shape: tuple[int, ...]) -> None:
    net = make_recipe(name, TOYS[name]).model()  # type: ignore[attr-defined]
    net.train()
    x, t, labels = torch.randn(64, *shape), torch.full((64,), 500.0), torch.zeros(64, dtype=torch.long)
    assert not net(x, t, class_labels=labels).sample.any()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    assert torch.equal(net(x, t, class_labels=labels).sample, net(x, t, class_labels=labels).sample)


# -- the judge


def test_the_judge_knows_real_pictures_and_counts_rightly() -> None:
    images, labels = (x[:200] for x in held_out())
    chances, _ = judge_of(CLASSES).look(list(torch.from_numpy(images.copy())[:, None] / 255))
    assert np.mean(chances.argmax(-1).numpy() == labels) > 0.9
    scores = shares([0, 0, 1, 1], [0, 0, 1, 2])
    assert scores == {"class_agreement": 0.75, "class_agreement_min": 0.5, "T-shirt": 1.0, "trousers": 0.5}


def test_pictures_are_asked_for_equally_from_seeds_of_their_own() -> None:
    real, calls = held_out(), []  # type: ignore[var-annotated]

    class Real:
        """Hands out real pictures of the classes that it is asked for."""

        def set_progress_bar_config(self, disable: bool) -> None: ...

        def __call__(self, labels: list[int], guidance: float, steps: int, generator: list[torch.Generator]) -> Any:
            calls.append((labels, guidance, steps, [g.initial_seed() for g in generator]))
            rows = [int(np.flatnonzero(real[1] == c)[0]) for c in labels]
            return type("Out", (), {"images": torch.from_numpy(real[0][rows])[:, None] / 255})

    told: list[str] = []
    scores = sample_and_judge(Real(), 6, 7, 1.5, lambda text, done: told.append(text))
    assert [(len(c[0]), c[1], c[2]) for c in calls] == [(50, 1.5, 7), (10, 1.5, 7)]
    assert [s for c in calls for s in c[3]] == list(range(60))
    assert sorted(c for call in calls for c in call[0]) == sorted(list(range(10)) * 6)
    assert told == ["scoring: 0 of 60 pictures", "scoring: 50 of 60 pictures"]
    assert list(scores) == ["class_agreement", "class_agreement_min", *CLASSES]
    assert scores["class_agreement"] >= 0.8


# -- the recipes


def test_stopped_and_taken_up_again_it_ends_in_the_same_bits(
    whole: tuple[str, Path, Trained], data: Path, tmp_path: Path
) -> None:
    name, out, _ = whole
    for stop in STOPS[name]:
        with pytest.raises(Cancelled):
            train(name, data, tmp_path, stop_at=stop)
        assert not (tmp_path / "model_index.json").exists()
    trained, told = train(name, data, tmp_path)
    assert told == LAST[name]
    assert bits(name, tmp_path) == bits(name, out)
    assert trained.scores == whole[2].scores
    train(name, data, tmp_path / "other", seed=1)
    assert all(a != b for a, b in zip(bits(name, tmp_path / "other"), bits(name, out), strict=True))


def test_what_is_handed_over_is_a_pipeline_that_loads(whole: tuple[str, Path, Trained]) -> None:
    name, out, trained = whole
    for part in PARTS[name]:
        weights = load_file(out / part / WEIGHTS)
        assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in weights.values())
    pipeline = ClassConditionalPipeline.from_pretrained(out, local_files_only=True)
    assert pipeline.config.id2label == dict(enumerate(CLASSES))
    assert trained.parameters == sum(p.numel() for part in PARTS[name] for p in getattr(pipeline, part).parameters())
    scores = sample_and_judge(pipeline, 1, guidance=GUIDANCE[name])
    if name == "fashion-latent":
        scores["reconstruction_psnr"] = reconstruction_psnr(pipeline.vae, held_out()[0][:12], lambda text, done: None)
    assert scores == trained.scores
    assert trained == Trained.model_validate_json((out / "training.json").read_bytes())
    steps = {"autoencode": 2, "draw": 2} if name == "fashion-latent" else {"draw": 2}
    assert (trained.recipe, trained.examples, trained.steps, trained.library) == (name, 10, steps, "diffusers")
    assert list(trained.seconds) == list(steps)
    config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == ("DDIMScheduler" if name == "fashion-unet" else "FlowMatchEulerDiscreteScheduler")


def test_the_model_card(whole: tuple[str, Path, Trained]) -> None:
    name, out, trained = whole
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\nlibrary_name: diffusers\n---\n")
    knobs = {k: v for k, v in TOYS[name].items() if k != "data"}
    assert all(f"--knob {k}={v}" in text for k, v in knobs.items())
    assert f"pareto-studio train {name} --out DIR --seed 0 --threads 1" in text
    assert f"Measured on 10 pictures from fixed seeds (20 steps, guidance {GUIDANCE[name]:g}), as fashion-vit names them" in text
    for score in ("class_agreement", *(["reconstruction_psnr"] if name == "fashion-latent" else [])):
        assert f"| {score} | {trained.scores[score]:.4f} |" in text
    kinds = {"unet": "UNet2DModel", "transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"}
    net = " + ".join(kinds[part] for part in PARTS[name])
    assert f"`ClassConditionalPipeline ({net})`, {trained.parameters:,} parameters, bfloat16" in text


def test_the_pipeline_decodes_what_the_transformer_was_taught(data: Path, tmp_path: Path) -> None:
    """Its latents have mean zero and spread one, and lead back to what the VAE makes of the training images."""
    recipe: Any = make_recipe("fashion-latent", {**TOYS["fashion-latent"], "data": str(data)})
    images = read_split(data, "train")[0]
    subject = recipe.subject(TrainingRun(tmp_path), images)
    vae = subject.parts["vae"]
    assert subject.values.shape == (50, 4, 7, 7)
    assert float(subject.values.mean()) == pytest.approx(0, abs=1e-4)
    assert float(subject.values.std()) == pytest.approx(1, abs=1e-4)
    shown = ClassConditionalPipeline(recipe.scheduler(), transformer=recipe.model(), vae=vae).pictures(subject.values)
    with torch.no_grad():
        wanted = vae.decode(vae.encode(pictures(images)).latent_dist.mean).sample
    assert shown.shape == (50, 1, 28, 28)
    torch.testing.assert_close(shown, (wanted / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_decoded_pictures_are_raced_compared_and_judged(data: Path, tmp_path: Path) -> None:
    train("fashion-latent", data, tmp_path)
    workload = WorkloadSpec(id="generate-images", options={"steps": 4, "items": 2})
    spec = ExperimentSpec(model=str(tmp_path), workload=workload, lanes=(Pipeline(), parse_pipeline("fewer-steps")), threads=1)
    events = list(run(spec))
    assert events[-1].event == "finished", events[-1]
    results = results_of(events)
    same, fewer = ({name: lane.value(name) for name in lane.sources} for lane in results.lanes)
    assert (same["same_output"], fewer["denoising_steps"]) == (1, 2)
    assert {"psnr", "ssim", "class_agreement", "feature_similarity"} <= fewer.keys()
    assert fewer["class_agreement"] in (0, 0.5, 1)
    stored = [t for part in PARTS["fashion-latent"] for t in load_file(tmp_path / part / WEIGHTS).values()]
    positions = 49 * 32  # the transformer's table of them is no part of the file
    assert same["weight_bytes"] == 4 * (sum(t.numel() for t in stored) + positions)


def test_rounding_weights_is_what_saving_does() -> None:
    net = nn.Linear(3, 3)
    rounded = net.weight.detach().bfloat16()
    round_weights(net)
    assert net.weight.dtype == torch.float32
    assert torch.equal(net.weight, rounded.float())
