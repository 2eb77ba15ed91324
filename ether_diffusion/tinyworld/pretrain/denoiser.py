"""The UNet: v-prediction on standardised latents, conditioned on the features of the frozen text tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ether_diffusion.files import Digest, whole_file
from ether_diffusion.pictures import save_png, sheet
from ether_diffusion.randomness import generator
from ether_diffusion.tinyworld.figures import sample_captions
from ether_diffusion.tinyworld.phrasing import caption, training_caption
from ether_diffusion.tinyworld.render import LABELS
from ether_diffusion.tinyworld.scenes import CLASSES

from .networks import build_scheduler
from .rendered import Pictures
from .stage import Stage, batch, half

BATCH = 16
VAE_FACTOR = 4  # pixels per latent along one side
CAPTION_DROPOUT = 0.1  # for classifier-free guidance
THING = 5.0  # weight of a thing's latents relative to the background's


def denoiser_stage(
    pipeline: StableDiffusionPipeline,
    latents: dict[str, Tensor],
    pictures: Pictures,
    fresh: Pictures,
    steps: int,
    *,
    compiled: bool = False,
) -> Stage:
    """Mean squared error of v (Salimans and Ho 2022), logit-normal timesteps, things weighted.

    Args:
        latents: The result of `encode_all` for `pictures`.
        compiled: Train through `torch.compile`: needs a compiler and two minutes; steps then take 0.8 of the time.
    """
    unet: UNet2DConditionModel = pipeline.unet
    predict: Any = torch.compile(unet) if compiled else unet
    noises: Any = DDPMScheduler.from_config(dict(build_scheduler().config))

    def loss(step: int) -> dict[str, Tensor]:
        chosen = batch("denoiser", step, BATCH, len(pictures))
        dice = generator(0, "pretrain/denoiser/noise", step)
        mean, deviation = (latents[part][chosen].float() for part in ("mean", "deviation"))
        clean = mean + deviation * torch.randn(mean.shape, generator=dice)
        noise = torch.randn(mean.shape, generator=dice)
        # Logit-normal (Esser et al. 2024): shapes emerge in the middle; the two ends only set tint and texture.
        timesteps = (torch.randn(BATCH, generator=dice).sigmoid() * noises.config.num_train_timesteps).long()
        dropped = torch.rand(BATCH, generator=dice) < CAPTION_DROPOUT
        texts = [
            "" if drop else training_caption(pictures.scene(int(k)), step * len(pictures) + int(k))
            for k, drop in zip(chosen, dropped, strict=True)
        ]
        hidden = text_features(pipeline, texts)
        device = hidden.device
        noisy, target = noises.add_noise(clean, noise, timesteps), noises.get_velocity(clean, noise, timesteps)
        with half(hidden):
            predicted = predict(noisy.to(device), timesteps.to(device), hidden).sample
        squares = (predicted.float() - target.to(device)).square().mean(dim=1)
        weights = _weights(pictures.labels(chosen)).to(device)
        return {"loss": (weights * squares).sum() / weights.sum(), "plain": squares.mean()}

    def validate(path: Path) -> dict[str, float]:
        texts = [caption(fresh.scene(k), k) for k in range(32)]
        images = sample_captions(pipeline, texts, "pretrain/look")
        save_png(sheet([(" | ".join(texts[k : k + 4]), images[k : k + 4]) for k in range(0, 32, 4)], 128), path)
        return {}

    return Stage("denoiser", unet, loss, validate, steps, learning_rate=8e-4, decay=0.9995)


def _weights(labels: Tensor) -> Tensor:
    """(B, h, w): things and their outlines count five times, because backgrounds are learned long before them.

    A weight per place does not change the expected image.
    """
    things = (labels >= LABELS.index(CLASSES[0])).float()[:, None]
    return 1 + (THING - 1) * F.max_pool2d(things, 3 * VAE_FACTOR, stride=VAE_FACTOR, padding=VAE_FACTOR)[:, 0]


@torch.no_grad()
def text_features(pipeline: StableDiffusionPipeline, texts: list[str]) -> Tensor:
    """(B, tokens, width), padded as diffusers' pipeline pads."""
    tokens = pipeline.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return pipeline.text_encoder(tokens["input_ids"].to(pipeline.text_encoder.device))[0]


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Pictures, folder: Path) -> dict[str, Tensor]:
    """Means and deviations of all latents, each (N, C, h, w) in fp16, cached in `folder` for this autoencoder."""
    path = folder / f"latents-{digest(vae)}-{len(pictures)}.safetensors"
    if not path.exists():
        parts = [vae.encode(pictures.images(k)).latent_dist for k in torch.arange(len(pictures)).split(128)]  # pyright: ignore
        found = {"mean": torch.cat([p.mean for p in parts]), "deviation": torch.cat([p.std for p in parts])}
        with whole_file(path) as partial:
            save_file({name: tensor.half().cpu().contiguous() for name, tensor in found.items()}, partial)
    return load_file(path)


def digest(module: nn.Module) -> str:
    """A digest of every weight and its name."""
    found = Digest(6)
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name, tensor.detach().cpu().float().numpy().tobytes())
    return found.hex()


def assemble(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as a diffusers pipeline without safety checker and progress bars."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
