"""Another VAE: valid names, refusals, and that a run samples with the VAE that it was trained with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, sample_images
from ether_diffusion.models.bases import check_base, fingerprint, load_base
from ether_diffusion.models.vaes import load_vae
from ether_diffusion.training import dreambooth
from ether_diffusion_cli import main


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VAE that fits the miniature and decodes differently."""
    folder = tmp_path_factory.mktemp("vae")
    vae = load_base("tiny").vae
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.25)  # pyright: ignore[reportOptionalMemberAccess]
        vae.encoder.conv_out.bias.add_(0.5)  # pyright: ignore[reportOptionalMemberAccess]
    vae.save_pretrained(folder)
    return folder


def test_the_folder_of_a_vae_and_of_a_pipeline(other: Path, tmp_path: Path) -> None:
    base = load_base("tiny", vae=str(other))
    assert fingerprint(base.vae) == fingerprint(AutoencoderKL.from_pretrained(other))
    assert fingerprint(base.vae) != fingerprint(load_base("tiny").vae)
    assert not any(parameter.requires_grad for parameter in base.vae.parameters())
    base.pipeline().save_pretrained(tmp_path / "pipeline")
    assert fingerprint(load_vae(str(tmp_path / "pipeline"))) == fingerprint(base.vae)
    assert load_base("tiny", torch.bfloat16, vae=str(other)).vae.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 4}, "latent channels 4, expected 8"),
        (
            {"block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
            "pixels per latent 2, expected 4",
        ),
        ({"scaling_factor": 0.13025}, r"scaling factor 0\.13025, expected \d"),
    ],
)
def test_a_vae_with_other_latents_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    config = {key: value for key, value in load_base("tiny").vae.config.items() if not key.startswith("_")}
    up = {"up_block_types": ("UpDecoderBlock2D",) * len(change.get("block_out_channels", (0,) * 3))}
    AutoencoderKL(**{**config, **up, **change}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"vae: .* does not fit the base: {message}"):
        load_base("tiny", vae=str(tmp_path))


def test_an_invalid_vae_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    for name, message in (
        ("nowhere", r"vae: 'nowhere' does not exist\. Ways to name a VAE"),
        (str(tmp_path / "nowhere.safetensors"), "vae: .* does not exist"),
        (str(tmp_path / "empty"), r"has no config\.json, nor has its folder vae/"),
    ):
        with pytest.raises(UserError, match=message):
            check_base("tiny", name)
    with pytest.raises(UserError, match="is a AutoencoderTiny; expected an AutoencoderKL"):
        load_vae(str(tmp_path / "other"))


def test_a_run_samples_with_the_vae_it_was_trained_with(
    other: Path, tmp_path: Path, make_config: Callable[..., dreambooth.DreamBoothConfig]
) -> None:
    run = tmp_path / "run"
    dreambooth.run(make_config(run, f"vae={other}", "data.prior=null", "training.batch_size=1", "training.steps=1"))
    assert read_adapter(run).vae == str(other)
    jobs = jobs_for(["a qwe toy"], 1)

    def image(adapter: Path, vae: str | None = None) -> bytes:
        pipeline, _ = load_pipeline(adapter, vae=vae)
        return next(iter(sample_images(pipeline, jobs, Sampling(steps=1), seed=0)))[1].tobytes()

    own = image(run)
    assert own == image(run, str(other)) == image(run / "checkpoints/step-000001", str(other))
    load_base("tiny").vae.save_pretrained(tmp_path / "own")
    assert own != image(run, str(tmp_path / "own"))
    command = ["generate", "--adapter", str(run), "--prompt", "a qwe toy", "--steps", "1", "--output"]
    assert main([*command, str(tmp_path / "images")]) == 0
    assert json.loads((tmp_path / "images/images.jsonl").read_text())["vae"] == str(other)
    with pytest.raises(UserError, match=r"vae was .*, is None"):
        dreambooth.run(
            make_config(run, "data.prior=null", "training.batch_size=1", "training.steps=2", "training.resume=true")
        )


def test_class_images_are_generated_with_it(
    other: Path, tmp_path: Path, make_config: Callable[..., dreambooth.DreamBoothConfig]
) -> None:
    for name, vae in (("own", "null"), ("other", other)):
        overrides = (f"data.prior.cache_dir={tmp_path / name}", "data.prior.num_images=1", "training.steps=1")
        overrides += ("training.batch_size=1", "data.prior.sampling.steps=1")
        dreambooth.run(make_config(tmp_path / f"run-{name}", f"vae={vae}", *overrides))
    one, two = (next((tmp_path / name).rglob("00000.png")).read_bytes() for name in ("own", "other"))
    assert one != two
