"""The diffusion adapter: the library's own pictures, step by step, on every kind of pipeline."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from studio_state.errors import ModelError, WorkloadError
from studio_state.experiment import ExperimentSpec
from tests.tiny_diffusion import BUILDERS, build_pipeline
from workers.data.pictures import as_png
from workers.families.diffusion import DECODE, ENCODE, STEP, preview, wanted
from workers.host import ModelHost
from workers.models.info import model_info
from workers.models.resolve import resolve
from workers.session import Cancelled, Session
from workers.workloads.base import Item

STEPS = 3
TRAITS = {
    "dit": {"dit", "latent", "class-conditional", "guided"},
    "stable-diffusion": {"unet", "latent", "text-conditional", "guided"},
    "pixart": {"dit", "latent", "text-conditional", "guided"},
    "sd3": {"dit", "flow", "latent", "text-conditional", "guided", "joint-attention"},
    "flux": {"dit", "flow", "latent", "text-conditional", "joint-attention"},
    "own-latent": {"dit", "flow", "latent", "class-conditional", "guided"},
}
BY_CLASS = ("dit", "own-latent")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def opened(folder: Path, workload: dict[str, Any] | None = None) -> Session:
    host = ModelHost()
    spec = ExperimentSpec.model_validate({"model": str(folder), "workload": workload or {"id": "generate-images"}, "lanes": []})
    info = host.inspect(spec)
    return host.open(spec, info, torch.device("cpu"))[0]


def asked(session: Session, seeds: list[int], guidance: float | None = 3.0, steps: int = STEPS) -> list[Item]:
    size = 16 if session.info.architecture == "FluxPipeline" else 0  # its own is 256 whatever its parts are
    data = {"steps": steps, "guidance": guidance, "size": size, "label": 1}
    return [Item(id=f"p{s}", task="draw", chat=False, prompt="a red boat", data={**data, "seed": s}) for s in seeds]


@pytest.mark.parametrize("kind", BUILDERS)
def test_the_pictures_are_the_librarys_own(kind: str, folders: Path) -> None:
    session = opened(build_pipeline(kind, folders))
    trace = session.family.begin(session, asked(session, [5, 6]))
    kinds = [(step.kind, step.place) for step in session.family.run(session, trace)]
    assert kinds == [(ENCODE, (0, 0)), *[(STEP, (n + 1, STEPS)) for n in range(STEPS)], (DECODE, (0, 0))]
    pipeline: Any = session.model.pipeline
    call: dict[str, Any] = {"class_labels": [1, 1]} if kind in BY_CLASS else {"prompt": ["a red boat"] * 2}
    if kind == "pixart":
        call["use_resolution_binning"] = False
    if kind == "flux":
        call |= {"height": 16, "width": 16}
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    with torch.inference_mode():
        images = pipeline(**call, guidance_scale=3.0, num_inference_steps=STEPS, generator=generators, output_type="pt").images
    for mine, theirs in zip(trace.drawn, images, strict=True):
        assert torch.equal(mine, torch.as_tensor(theirs).float().clamp(0, 1))
    assert not torch.equal(trace.drawn[0], trace.drawn[1])
    guided = 0 if kind == "flux" else STEPS
    assert trace.counts == {"denoiser_calls": STEPS, "denoising_steps": STEPS, "guided_steps": guided}
    assert session.denoising is None
    assert "step" not in vars(pipeline.scheduler)
    assert not session.model.denoiser._forward_pre_hooks


@pytest.mark.parametrize("kind", BUILDERS)
def test_family_traits_and_weights_are_known_before_loading(kind: str, folders: Path) -> None:
    folder = build_pipeline(kind, folders)
    info = model_info(resolve(str(folder)))
    assert (info.family, set(info.traits)) == ("diffusion", TRAITS[kind])
    assert info.architecture == BUILDERS[kind]().__class__.__name__
    tensors = {t.data_ptr(): t.numel() for t in opened(folder).model.state_dict().values()}  # tied ones once, as stored
    assert info.parameters == sum(tensors.values())


@pytest.mark.parametrize("kind", BUILDERS)
def test_the_parts_are_the_denoisers(kind: str, folders: Path) -> None:
    session = opened(build_pipeline(kind, folders))
    parts = session.family.parts(session.model)
    name = session.model.denoiser_name
    assert all(parts[kind] for kind in ("layers", "attentions", "linears"))
    assert all(n.startswith(f"{name}.") for names in parts.values() for n in names)
    for names in parts.values():
        for n in names:
            session.model.get_submodule(n)


def test_guidance_is_seen_in_the_rows_of_the_denoiser(folders: Path) -> None:
    session = opened(build_pipeline("stable-diffusion", folders))
    for guidance, guided in ((1.0, False), (4.0, True)):
        trace = session.family.begin(session, asked(session, [1], guidance))
        seen = {
            session.denoising.guided for step in session.family.run(session, trace) if step.kind == STEP and session.denoising
        }
        assert seen == {guided}


def test_a_run_that_is_left_or_cancelled_undoes_everything(folders: Path) -> None:
    session = opened(build_pipeline("dit", folders))
    trace = session.family.begin(session, asked(session, [1]))
    run = session.family.run(session, trace)
    next(run)
    next(run)
    run.close()
    assert session.denoising is None
    assert not session.model.denoiser._forward_pre_hooks
    assert "step" not in vars(session.model.pipeline.scheduler)
    asks = iter([False, False, True])
    with session.having(is_cancelled=lambda: next(asks)), pytest.raises(Cancelled):
        session.family.probe(session, asked(session, [1])[0])
    assert session.denoising is None
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_pictures_on_the_way() -> None:
    assert [s for s in range(20) if wanted(s, 20)] == [1, 3, 5, 7, 9, 11, 13, 15, 17]
    assert [s for s in range(3) if wanted(s, 3)] == [0, 1]
    assert [s for s in range(1) if wanted(s, 1)] == []
    pixels = type("Model", (), {"pipeline": type("P", (), {"vae": None})()})()
    assert len(preview(pixels, (torch.zeros(6, 1, 8, 8),), 6)) == 4
    assert preview(pixels, (torch.zeros(6, 16, 8),), 6) == []  # packed latents are no picture


def test_pictures_on_the_way_are_decoded_by_a_vae_of_the_studios(folders: Path) -> None:
    session = opened(build_pipeline("own-latent", folders))
    trace = session.family.begin(session, asked(session, [5, 6]))
    shown = {step.place: step.pictures for step in session.family.run(session, trace) if step.pictures}
    assert list(shown) == [(1, STEPS), (2, STEPS)]
    model, kept = session.model, []  # type: ignore[var-annotated]
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    model.pipeline(
        [1, 1], 3.0, STEPS, generators, callback_on_step_end=lambda p, i, t, given: kept.append(given["latents"]) or {}
    )
    for latents, pictures in zip(kept, shown.values(), strict=False):
        with torch.no_grad():
            decoded = model.vae.decode(latents / 0.5 + 0.06).sample
        assert pictures == [as_png((x / 2 + 0.5).permute(1, 2, 0).numpy()) for x in decoded]


def test_pictures_on_the_way_are_decoded_outside_the_time_of_a_step(folders: Path) -> None:
    """A clock that ticks with every reading, and a decoder that reads it: no step is longer for its picture."""
    session = opened(build_pipeline("own-latent", folders))
    ticks = itertools.count()
    session.clock = lambda: float(next(ticks))  # type: ignore[method-assign]

    def read(*_: Any) -> None:
        session.clock()

    handle = session.model.vae.decoder.register_forward_hook(read)
    try:
        trace = session.family.begin(session, asked(session, [5]))
        steps = [(step.kind, step.seconds, len(step.pictures)) for step in session.family.run(session, trace)]
    finally:
        handle.remove()
    assert steps == [(ENCODE, 1.0, 0), (STEP, 1.0, 1), (STEP, 1.0, 1), (STEP, 1.0, 0), (DECODE, 2.0, 0)]


def test_a_batch_shares_its_steps(folders: Path) -> None:
    session = opened(build_pipeline("dit", folders))
    items = asked(session, [1]) + asked(session, [2], steps=5)
    with pytest.raises(WorkloadError, match="same steps, guidance and size"):
        session.family.begin(session, items)


def test_incomplete_and_foreign_folders_are_refused(folders: Path, tmp_path: Path) -> None:
    import json
    import shutil

    for kind in BY_CLASS:
        without = tmp_path / kind
        shutil.copytree(build_pipeline(kind, folders), without)
        shutil.rmtree(without / "vae")
        with pytest.raises(ModelError, match=r"lacks the folder 'vae', which its model_index\.json names; copy or download"):
            resolve(str(without))
    whole = build_pipeline("dit", folders)
    index = json.loads((whole / "model_index.json").read_text())
    cases = {
        "has no scheduler": {k: v for k, v in index.items() if k != "scheduler"},
        "neither a unet nor a transformer": {k: v for k, v in index.items() if k != "transformer"},
        "Python code of its own": {**index, "vae": ["my_vae", "MyVAE"]},
        "names no pipeline class": {k: v for k, v in index.items() if k != "_class_name"},
    }
    for n, (message, changed) in enumerate(cases.items()):
        folder = tmp_path / str(n)
        shutil.copytree(whole, folder)
        (folder / "model_index.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=message):
            resolve(str(folder))
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "MyPipeline"}))
    with pytest.raises(ModelError, match="'MyPipeline', which diffusers"):
        opened(other)
