"""Subject-driven generation (DreamBooth, paper section 5.1): a few photos of a subject -> an adapter that draws it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from ether_diffusion.adapters.attach import attach, count_parameters, trainable_parameters, weightless_copy
from ether_diffusion.adapters.methods import METHODS, AdapterSettings, EtherPlusSettings
from ether_diffusion.adapters.storage import check_same_tensors, fill_adapter, read_adapter, save_adapter
from ether_diffusion.config import Settings
from ether_diffusion.data.dreambooth import DreamBoothDataset, dreambooth_prompts
from ether_diffusion.data.photos import PhotoFolder, find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.generation import Sampling, draw, jobs_for
from ether_diffusion.models.bases import DEFAULT_BASE, TINY, Base, check_base, check_resolution, load_base, move
from ether_diffusion.pictures import save_png, sheet
from ether_diffusion.randomness import generator

from .class_images import ClassImages, class_images
from .environment import set_threads
from .loop import Report, Trainer
from .plan import make_plan
from .run import RunFolder
from .settings import TrainingSettings, ValidationSettings

TASK = "dreambooth"


class PriorSettings(Settings):
    """Prior preservation: images of other members of the class keep the class from collapsing into the subject."""

    weight: NonNegativeFloat = 1.0
    num_images: PositiveInt = 200
    class_dir: Path | None = None
    """A folder of your own class images; null: they are drawn by the base model, once, into `cache_dir`."""
    cache_dir: Path | None = None
    """Default: `~/.cache/ether_diffusion/class_images`, a folder for every base, prompt, seed and sampler."""
    seed: int = 0
    sampling: Sampling = Sampling()


class DataSettings(Settings):
    """The subject."""

    instance_dir: str
    """A folder with 3 to 6 photos of the subject."""
    class_name: str = Field(min_length=1)
    """What the subject is one of, as in `a photo of qwe {class_name}`: dog, backpack, toy …"""
    identifier: str = Field("qwe", min_length=1)
    """A rare word that comes to mean the subject."""
    instance_prompt: str | None = None
    """Default: `a photo of {identifier} {class_name}`."""
    class_prompt: str | None = None
    """Default: `a photo of {class_name}`."""
    resolution: PositiveInt = 512
    """Side of the square crops in pixels; a multiple of 8."""
    crop: Literal["random", "center"] = "random"
    horizontal_flip: bool = False
    prior: PriorSettings | None = PriorSettings()
    """null: no prior preservation."""


class DreamBoothConfig(Settings):
    """Everything that a DreamBooth run depends on."""

    base_model: str = DEFAULT_BASE
    """A hub name, a folder in diffusers' layout, or `tiny`."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    output_dir: Path
    seed: int = 0
    adapter: AdapterSettings = EtherPlusSettings()
    data: DataSettings
    training: TrainingSettings
    validation: ValidationSettings = ValidationSettings()

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> DreamBoothConfig:
        if (self.training.steps is None) == (self.training.epochs is None):
            raise ValueError("training: give either steps or epochs; the other one is null, as in training.steps=null")
        return self


def resolve(config: DreamBoothConfig) -> DreamBoothConfig:
    """Fill in what defaults to something that depends on the rest: the learning rate and the prompts."""
    training = config.training
    if training.learning_rate is None:
        rate = METHODS[config.adapter.method].learning_rates[TASK]
        training = training.model_copy(update={"learning_rate": rate})
    instance, of_class = dreambooth_prompts(config.data.identifier, config.data.class_name)
    data = config.data.model_copy(
        update={
            "instance_prompt": config.data.instance_prompt or instance,
            "class_prompt": config.data.class_prompt or of_class,
        }
    )
    return config.model_copy(update={"training": training, "data": data})


class DenoisingLoss(nn.Module):
    """The UNet and the loss of its prediction: all that is trained, in one module.

    The mean squared error over instance samples, plus `prior_weight` times the one over class samples.
    """

    def __init__(self, unet: nn.Module, prior_weight: float) -> None:
        super().__init__()
        self.unet = unet
        self.prior_weight = prior_weight

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        prediction = self.unet(batch["noisy_latents"], batch["timesteps"], batch["encoder_hidden_states"]).sample
        errors = F.mse_loss(prediction.float(), batch["target"].float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
        instance = errors[: batch["instances"]].mean()
        if batch["instances"] == len(errors):
            return {"loss": instance}
        prior = errors[batch["instances"] :].mean()
        return {"loss": instance + self.prior_weight * prior, "instance_loss": instance, "prior_loss": prior}


class DreamBoothTask:
    """Photos and class images -> noisy latents -> the UNet's loss."""

    def __init__(
        self, config: DreamBoothConfig, base: Base, dataset: DreamBoothDataset, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.base, self.dataset = config, base, dataset
        self.device, self.dtype = device, dtype
        self.noise: Any = DDPMScheduler.from_config(base.scheduler_config)
        self.module: nn.Module = DenoisingLoss(base.unet, config.data.prior.weight if config.data.prior else 0.0)
        self._embeddings: dict[str, Tensor] = {}
        move(base.vae, device)
        move(base.text_encoder, device)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [{"params": list(trainable_parameters(self.base.unet).values()), "lr": learning_rate}]

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Instances first, then as many class samples."""
        batch: dict[str, Any] = {"indices": [sample["index"] for sample in samples]}
        parts = [("instance", "pixel_values", "prompt")]
        if "class_pixel_values" in samples[0]:
            parts.append(("class", "class_pixel_values", "class_prompt"))
        batch["pixel_values"] = torch.stack([sample[pixels] for _, pixels, _ in parts for sample in samples])
        batch["prompts"] = [sample[prompt] for _, _, prompt in parts for sample in samples]
        batch["streams"] = [(stream, sample["index"]) for stream, _, _ in parts for sample in samples]
        return batch

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Latents, noise and timesteps, each drawn from (seed, stream, sample index)."""
        seed, streams = self.config.seed, batch["streams"]

        def per_sample(name: str, shape: Sequence[int]) -> Tensor:
            draws = [torch.randn(*shape, generator=generator(seed, f"{s}/{name}", i)) for s, i in streams]
            return torch.stack(draws).to(self.device)

        moments = self.base.vae.encode(batch["pixel_values"].to(self.device, self.base.vae.dtype)).latent_dist  # pyright: ignore
        shape = moments.mean.shape[1:]
        latents = (moments.mean + moments.std * per_sample("latents", shape)).float()
        latents = latents * self.base.vae.config["scaling_factor"]
        noise = per_sample("noise", shape)
        steps = self.noise.config["num_train_timesteps"]
        drawn = [torch.randint(steps, (1,), generator=generator(seed, f"{s}/timestep", i)) for s, i in streams]
        timesteps = torch.cat(drawn).to(self.device)
        kind = self.base.prediction_type
        target = noise if kind == "epsilon" else self.noise.get_velocity(latents, noise, timesteps)  # pyright: ignore
        return {
            "noisy_latents": self.noise.add_noise(latents, noise, timesteps).to(self.dtype),  # pyright: ignore
            "timesteps": timesteps,
            "encoder_hidden_states": torch.cat([self._embed(prompt) for prompt in batch["prompts"]]),
            "target": target,
            "instances": len(batch["indices"]),
        }

    def _embed(self, prompt: str) -> Tensor:
        """(1, 77, D) text features; the text encoder is frozen, so each prompt is encoded once."""
        if prompt not in self._embeddings:
            tokens = self.base.tokenizer(
                prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            )
            embedding = self.base.text_encoder(tokens["input_ids"].to(self.device))[0]
            self._embeddings[prompt] = embedding.to(self.dtype)
        return self._embeddings[prompt]

    def save(self, folder: Path, step: int) -> None:
        data = self.config.data
        save_adapter(
            self.base.unet,
            folder / "adapter",
            base_model=self.config.base_model,
            notes={"instance prompt": f"`{data.instance_prompt}`", "training steps": step, "seed": self.config.seed},
        )

    def load(self, folder: Path) -> None:
        fill_adapter(self.base.unet, read_adapter(folder / "adapter"))

    @torch.no_grad()
    def validate(self, step: int, path: Path) -> dict[str, float]:
        """Draw every validation prompt into one grid. Counts images that are black all over."""
        settings = self.config.validation
        was_training = self.base.unet.training
        self.base.unet.eval()
        jobs = jobs_for(settings.prompts, settings.images_per_prompt)
        resolution = self.config.data.resolution
        drawn = draw(self.base.pipeline(), jobs, settings.sampling, seed=settings.seed, resolution=resolution)
        images = [image for _, image in drawn]
        self.base.unet.train(was_training)
        n = settings.images_per_prompt
        rows = [(prompt, images[k * n : (k + 1) * n]) for k, prompt in enumerate(settings.prompts)]
        save_png(sheet(rows), path, {"step": step, **settings.model_dump(mode="json")})
        return {"black_images": float(sum(not image.getbbox() for image in images))}


def run(config: DreamBoothConfig, *, dry_run: bool = False) -> Report:
    """Train an adapter as the config says; into `output_dir`, or, dry, for one step and into nothing.

    Raises:
        UserError: the data, the base or the run folder is at fault; nothing has been written then.
    """
    config = resolve(config)
    folder = RunFolder(config.output_dir)
    if not dry_run:
        folder.check_free(resume=bool(config.training.resume))
    check_base(config.base_model)
    photos = find_photos(config.data.instance_dir)
    own_class = _own_class_images(config)
    warm_start = read_adapter(config.adapter.init_from) if config.adapter.init_from else None

    tracker = config.training.tracker if not dry_run and config.training.tracker != "none" else None
    if tracker == "wandb":
        _require_wandb()
    set_threads()
    accelerator = Accelerator(
        mixed_precision=config.training.mixed_precision, log_with=tracker, project_dir=str(folder.logs)
    )
    say = accelerator.print
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    base = load_base(config.base_model, revision=config.revision)
    check_resolution(config.data.resolution, base, "data.resolution")
    if base.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"base_model: predicts {base.prediction_type!r}; supported: epsilon, v_prediction.")
    trial = weightless_copy(base.unet)  # what cannot be attached is refused before class images are drawn
    attach(trial, config.adapter)
    if warm_start is not None:
        check_same_tensors(trial, warm_start)
    move(base.unet, dtype)

    class_folder = own_class or _drawn_class_images(config, base, accelerator, dry_run)
    matched = attach(base.unet, config.adapter, config.seed)
    if warm_start is not None:
        fill_adapter(base.unet, warm_start)
    if config.training.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    base.unet.train()

    dataset = DreamBoothDataset(
        photos,
        config.data.instance_prompt or "",
        resolution=config.data.resolution,
        crop=config.data.crop,
        horizontal_flip=config.data.horizontal_flip,
        seed=config.seed,
        class_folder=class_folder,
        class_prompt=config.data.class_prompt or "",
    )
    _introduce(config, base, photos, class_folder, matched, accelerator, dry_run)
    trainer = Trainer(
        DreamBoothTask(config, base, dataset, accelerator.device, dtype),
        config.training,
        accelerator,
        config=config,
        seed=config.seed,
        run=None if dry_run else folder,
        validate_every=config.validation.every if config.validation.prompts else None,
    )
    report = trainer.train()
    pace = f"{report.seconds_per_step:.2f} s a step, peak memory {report.peak_memory / 2**30:.2f} GiB"
    if dry_run:
        say(f"Dry run: {pace}. Nothing was written.")
    else:
        say(f"Adapter: {folder.adapter} ({pace if report.steps_taken else 'all steps were taken before'})")
        say(f'Draw:    ether-diffusion generate --adapter {folder.path} --prompt "{_example_prompt(config)}"')
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """`train_dreambooth.py`, and the module that `accelerate launch -m` takes from an installed wheel."""
    import ether_diffusion_cli

    return ether_diffusion_cli.main(["train", TASK, *(sys.argv[1:] if argv is None else argv)])


def _own_class_images(config: DreamBoothConfig) -> PhotoFolder | None:
    prior = config.data.prior
    return find_photos(prior.class_dir) if prior is not None and prior.class_dir is not None else None


def _drawn_class_images(
    config: DreamBoothConfig, base: Base, accelerator: Accelerator, dry_run: bool
) -> PhotoFolder | None:
    prior = config.data.prior
    if prior is None or prior.class_dir is not None:
        return None
    wanted = ClassImages(
        base_model=config.base_model,
        prompt=config.data.class_prompt or "",
        num_images=prior.num_images,
        resolution=config.data.resolution,
        seed=prior.seed,
        sampling=prior.sampling,
    )
    if dry_run:  # a trial draws nothing: the photos stand in, so that time and memory are those of the run
        return find_photos(config.data.instance_dir)
    return class_images(wanted, base, prior.cache_dir, accelerator)


def _introduce(
    config: DreamBoothConfig,
    base: Base,
    photos: PhotoFolder,
    class_folder: PhotoFolder | None,
    matched: list[str],
    accelerator: Accelerator,
    dry_run: bool,
) -> None:
    """What is about to be trained, on what, for how long."""
    say, training = accelerator.print, config.training
    plan = make_plan(training, len(photos.photos), accelerator.num_processes)
    for name, reason in photos.skipped:
        say(f"Skipped: {name} ({reason})")
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    trained, frozen = count_parameters(base.unet), sum(p.numel() for p in base.unet.parameters())
    random = " (random weights: expect noise, not pictures)" if base.name == TINY else ""
    say(f"Base:    {base.name}{random}, {frozen / 1e6:,.1f}M parameters in the UNet, {precision} precision")
    say(
        f"Adapter: {type(config.adapter).title}, {trained:,} trainable parameters in {len(matched)} layers, "
        f"learning rate {training.learning_rate:g}"
    )
    say(f'Photos:  {len(photos.photos)} in {photos.folder}, "{config.data.instance_prompt}"')
    prior = config.data.prior
    if prior is not None and prior.class_dir is None and dry_run:
        say(f'Prior:   {prior.num_images} images of "{config.data.class_prompt}" will be drawn; the photos stand in')
    elif class_folder is not None:
        say(f'Prior:   {len(class_folder.photos)} images in {class_folder.folder}, "{config.data.class_prompt}"')
    samples = f"{plan.samples_per_step} sample{'s' * (plan.samples_per_step > 1)}"
    say(f"Steps:   {plan.steps:,} with {samples} each, on {accelerator.device}")


def _example_prompt(config: DreamBoothConfig) -> str:
    prompts = config.validation.prompts
    return prompts[0] if prompts else f"a {config.data.identifier} {config.data.class_name} in the jungle"


def _require_wandb() -> None:
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("training.tracker: wandb is not installed: pip install 'ether-diffusion[tracking]'.") from None


if __name__ == "__main__":
    sys.exit(main())
