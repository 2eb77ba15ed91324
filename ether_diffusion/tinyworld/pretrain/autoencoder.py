"""The autoencoder: images to latents with mean 0 and standard deviation 1 in every channel, and back."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from ether_diffusion.randomness import generator
from ether_diffusion.tinyworld.figures import psnr, reconstruct

from .rendered import Pictures
from .stage import Stage, batch, half, save_rows

BATCH = 8
KL_WEIGHT = 3e-5  # of the mean over latents: keeps them smooth and images sharp


def autoencoder_stage(vae: AutoencoderKL, pictures: Pictures, fresh: Pictures, steps: int) -> Stage:
    """Absolute and squared errors of the pixels, and a small weight of the KL divergence."""

    def loss(step: int) -> dict[str, Tensor]:
        pixels = pictures.images(batch("autoencoder", step, BATCH, len(pictures)))
        with half(pixels):
            posterior = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
            latents = posterior.sample(generator(0, "pretrain/autoencoder/noise", step))
            decoded = vae.decode(latents).sample  # pyright: ignore[reportAttributeAccessIssue]
        decoded, mean, spread = decoded.float(), posterior.mean.float(), posterior.logvar.float()
        absolute, squared = F.l1_loss(decoded, pixels), F.mse_loss(decoded, pixels)
        divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        return {"loss": absolute + 2 * squared + KL_WEIGHT * divergence, "psnr": psnr(squared), "kl": divergence}

    def validate(path: Path) -> dict[str, float]:
        pixels = fresh.images(torch.arange(min(256, len(fresh))))
        decoded = reconstruct(vae, pixels)
        save_rows([pixels[:16], decoded[:16]], path)
        return {"PSNR on unseen scenes": float(psnr((decoded - pixels).square().mean(dim=(1, 2, 3))).mean())}

    return Stage("autoencoder", vae, loss, validate, steps, learning_rate=2e-3, decay=0.995)


@torch.no_grad()
def standardise(vae: AutoencoderKL, pictures: Pictures, samples: int = 4096) -> None:
    """Fold each channel's mean and deviation into the 1x1 convolutions around the latents: they become 0 and 1.

    With z' = (z - m) / s the encoder's last convolution gives (mean - m) / s and logvar - 2 log s, and the decoder's
    first takes s z' + m. Reconstructions do not change; plain diffusers loads the result.
    """
    chosen = torch.arange(min(samples, len(pictures))).split(64)
    latents = torch.cat([vae.encode(pictures.images(k)).latent_dist.mean for k in chosen])  # pyright: ignore
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    assert before is not None
    assert after is not None
    assert before.bias is not None
    assert after.bias is not None
    n = len(mean)
    before.weight[:n].div_(deviation[:, None, None, None])
    before.bias[:n].sub_(mean).div_(deviation)
    before.bias[n:].sub_(2 * deviation.log())
    after.bias.add_(after.weight[:, :, 0, 0] @ mean)
    after.weight.mul_(deviation[None, :, None, None])
