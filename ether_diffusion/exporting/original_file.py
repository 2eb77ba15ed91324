"""A Stable Diffusion v1 pipeline as one file in the original key layout, which most programs read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.errors import UserError
from ether_diffusion.models.original_layout import TEXT_PREFIX, original_names, original_shape


def original_tensors(pipeline: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """UNet, VAE and text encoder by their names in such a file, with the buffers of the schedule that it carries.

    Args:
        dtype: Of the weights; the schedule stays in single precision.

    Raises:
        UserError: a schedule that the layout does not know.
    """
    tensors = {}
    for part in ("unet", "vae", "text_encoder"):
        module = getattr(pipeline, part)
        weights = module.state_dict()
        for key, name in original_names(part, weights, {} if part == "text_encoder" else module.config).items():
            weight = weights[key].to(dtype)
            tensors[name] = weight.reshape(original_shape(name, tuple(weight.shape)))
    positions = pipeline.text_encoder.config.max_position_embeddings
    tensors[f"{TEXT_PREFIX}embeddings.position_ids"] = torch.arange(positions).unsqueeze(0)
    return tensors | _schedule(dict(pipeline.scheduler.config))


def _schedule(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The buffers of the forward process q and of its posterior (Ho et al. 2020, equations 4 to 7), 1,000 entries."""
    if config["beta_schedule"] != "scaled_linear" or config.get("trained_betas") is not None:
        raise UserError(
            f"the base's beta_schedule is {config['beta_schedule']}, and single files of Stable Diffusion v1 have "
            "scaled_linear. Export a folder."
        )
    ends = (config["beta_start"] ** 0.5, config["beta_end"] ** 0.5)
    betas = torch.linspace(*ends, config["num_train_timesteps"], dtype=torch.float64) ** 2
    alphas = 1 - betas
    products = alphas.cumprod(0)
    before = torch.cat((products.new_ones(1), products[:-1]))
    variance = betas * (1 - before) / (1 - products)
    buffers = {
        "betas": betas,
        "alphas_cumprod": products,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": products.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - products).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - products).log(),
        "sqrt_recip_alphas_cumprod": (1 / products).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / products - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp_min(1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - products),
        "posterior_mean_coef2": (1 - before) * alphas.sqrt() / (1 - products),
    }
    return {name: values.float() for name, values in buffers.items()}
