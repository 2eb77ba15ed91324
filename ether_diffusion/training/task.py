"""What a task is: its entry in the command line's table, and the base class of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ether_diffusion.adapters.attach import trainable_parameters
from ether_diffusion.adapters.certificate import CERTIFICATE, Certificate
from ether_diffusion.adapters.certify import Watch
from ether_diffusion.adapters.loading import fill_adapter
from ether_diffusion.adapters.saved_adapter import SavedAdapter, read_adapter
from ether_diffusion.adapters.saving import write_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.generation import fault, jobs_for, sample_images
from ether_diffusion.generation.sampling import check_scheduler
from ether_diffusion.models.bases import Base
from ether_diffusion.models.module_files import fill_module
from ether_diffusion.models.quantized import number_of_weights
from ether_diffusion.models.saved_modules import UNET, SavedModule, save_whole_module
from ether_diffusion.pictures import save_png, sheet

from .config import TaskConfig
from .environment import precision, to_device
from .frozen_encoders import FrozenEncoders
from .objective import Stream, denoising_loss, make_objective, normal
from .run_folder import RunFolder
from .schedule import Plan

C = TypeVar("C", bound=TaskConfig)


@dataclass(frozen=True)
class Report:
    """The result of a run."""

    steps_taken: int
    loss: float
    """Of the last step; nan if none was taken."""
    seconds_per_step: float
    """The median, without checkpoints and validation; nan if no step was taken."""
    peak_memory: int
    """Bytes: of tensors on an accelerator, or of the whole process on the CPU."""
    certificate: Certificate | None = None
    """What was checked of the result; None: a dry run, or another process saved it."""


@dataclass(frozen=True)
class TrainingTask(Generic[C]):
    """A kind of training: what the module of a task offers to the command line, under the name `TASK`."""

    name: str
    config: type[C]
    resolve: Callable[[C], C]
    """Fills in the defaults that depend on other settings. Raises UserError for a method that is not for this task."""
    run: Callable[..., Report]
    """`run(config, *, dry_run=False)`."""
    run_many: Callable[..., list[Report]] | None = None
    """`run_many(configs, *, dry_run=False, max_together=None)`: runs in shared passes; None: no such."""
    why_alone: str = "its runs do not train together."
    """The reason where there is no `run_many`."""
    hints: Mapping[str, str] = field(default_factory=dict)
    """Flags of other programs -> the key here that does the same, or a sentence on why there is none."""


class Task(Generic[C]):
    """One run of a task that trains a UNet, or an adapter in it, to denoise. `run_task` and the loop call its methods.

    A subclass's `__init__` finds and checks the data and the weights to start from, without loading a base or writing
    anything. Its `build` sets `module` and `dataset`; `collate` and `prepare` make batches of its samples.

    Args:
        config: The resolved config.
        previous: The adapter that `adapter.after` names.
        resumed: Whether the run resumes from a checkpoint, so that it needs no other weights to start from.
    """

    samples_per_epoch: int
    initial: SavedAdapter | SavedModule | None = None
    """The weights of the adapter, or of the whole UNet, that training starts from."""
    notes: Sequence[str] = ()
    """Lines about the data, such as files that are skipped."""
    facts: Mapping[str, str] = {}
    """Entries for the card of the saved adapter."""
    start_faults: Mapping[str, str] = {}
    """What is wrong with the adapter's initial values, as `start_fault`."""
    watch: Watch | None = None
    """What is seen of the run, by the loop."""
    certificate: Certificate | None = None
    """Of the adapter that was saved last."""
    module: nn.Module
    """All that is trained, in one module. `module(batch)` returns losses by name; the one named `loss` is minimised."""
    dataset: Any
    """Samples by global sample index, from 0 on without end."""
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    """Samples -> a batch. A function or static method, so that workers get it without the models."""

    def __init__(self, config: C, previous: SavedAdapter | None, resumed: bool) -> None:
        self.config = config

    def whole_weights(self, base: Base) -> int:
        """How many weights a checkpoint holds of a module that is trained whole; 0: only an adapter is trained."""
        return number_of_weights(base.denoiser) if self.config.trains_unet else 0

    def check_base(self, base: Base) -> None:
        """Refuse a base of a family that cannot do what the config says. Raises UserError."""
        prior = getattr(self.config.data, "prior", None)
        for key, section in (("validation", self.config.validation), ("data.prior", prior)):
            if section is not None:
                try:
                    check_scheduler(section.sampling, base.scheduler_config, base.family)
                except UserError as error:
                    raise UserError(f"{key}.sampling.{error}") from None

    def use_base(self, base: Base, accelerator: Accelerator, dry_run: bool) -> None:
        """Do what needs the bare base, before an adapter is in it."""

    def build(self, base: Base, plan: Plan, accelerator: Accelerator) -> None:
        """Take the base with what is trained in it."""
        self.base, self.device, self.dtype = base, accelerator.device, precision(accelerator)
        self.trains_text: bool = self.config.adapter.text_encoder
        self.encoders = FrozenEncoders(base, self.device, self.dtype, self.config.validation.enabled)
        self.objective = make_objective(base)

    def inputs(self) -> dict[str, str]:
        """Digests of what the data holds, by the settings that name it: a resumed run must have the same data."""
        return {}

    def texts(self) -> list[str]:
        """The prompts and captions of the run, of which those that the text encoder cuts are named."""
        return []

    def summary(self) -> list[str]:
        """Lines on what is trained next to the adapter, and on which data."""
        return []

    def fill_caches(self, plan: Plan, accelerator: Accelerator) -> None:
        """Do once what all samples need. A dry run skips it."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Trained parameters for the optimiser, each group with its `lr`: the denoiser's and the text encoders'."""
        groups = [list(trainable_parameters(model).values()) for model in self.base.adaptable.values()]
        return [{"params": parameters, "lr": learning_rate} for parameters in groups if parameters]

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The work on a batch before the trained module: frozen encoders, noise."""
        raise NotImplementedError

    def noised(self, moments: Sequence[tuple[Tensor, Tensor]], streams: Sequence[Stream]) -> dict[str, Tensor]:
        """Latents sampled from their moments, noised at random timesteps; targets and weights of the loss.

        Returns:
            `noisy_latents` (B, C, h, w) in the precision of training; `timesteps` (B,); `target` (B, C, h, w) and
            `weights` (B,) in fp32.
        """
        seed, settings = self.config.seed, self.config.training
        mean, deviation = (to_device(torch.stack(part), self.device) for part in zip(*moments, strict=True))
        shape = mean.shape[1:]
        z = to_device(normal(seed, streams, "latents", shape), self.device)
        x0 = self.base.family.latents(self.base.vae, mean + deviation * z)
        shape = x0.shape[1:]
        eps = to_device(normal(seed, streams, "noise", shape), self.device)
        if settings.noise_offset:
            offset = to_device(normal(seed, streams, "noise_offset", (shape[0], 1, 1)), self.device)
            eps = eps + settings.noise_offset * offset
        t = to_device(self.objective.timesteps(seed, streams), self.device)
        return {
            "noisy_latents": self.objective.noisy(x0, eps, t).to(self.dtype),
            "timesteps": t,
            "target": self.objective.target(x0, eps, t),
            "weights": self.objective.weights(t, settings.min_snr_gamma),
        }

    def text(self, prompts: list[str]) -> dict[str, Any]:
        """Conditioning by prompts; for text encoders that are trained, `tokens` instead."""
        return {"tokens": self.encoders.tokens(prompts)} if self.trains_text else self.encoders.text(prompts)

    def frames(self, frames: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Conditioning by where images come from, if the family has such."""
        if not frames:
            return {}
        return {name: to_device(tensor, self.device) for name, tensor in self.base.family.of_frames(frames).items()}

    def save(self, folder: Path, step: int) -> None:
        """Write the trained weights into `folder`: the adapter or the whole UNet, if the method trains one of them."""
        if self.config.trains_unet:
            save_whole_module(self.base.denoiser, folder / UNET.folder, UNET, **self.origin(step), texts=self.record())
        elif self.config.adapter.peft_type:
            text_encoders = self.base.trainable_text_encoders if self.trains_text else {}
            carriers: dict[str, Any] = {"text_encoders": text_encoders, "watch": self.watch}
            self.certificate = write_adapter(self.base.denoiser, folder / "adapter", **self.origin(step), **carriers)

    def watched(self) -> Certificate:
        """What was seen of the run so far."""
        return Certificate(self.watch.faults(), self.watch.measured()) if self.watch else Certificate()

    def record(self) -> dict[str, str]:
        """`watched`, as a file next to weights that are no adapter."""
        return {CERTIFICATE: self.watched().to_text()}

    def load(self, folder: Path) -> None:
        """Read the weights that `save` wrote."""
        if self.config.trains_unet:
            fill_module(self.base.denoiser, folder / UNET.folder, UNET.what)
        elif self.config.adapter.peft_type:
            saved = read_adapter(folder / "adapter")
            fill_adapter(self.base.denoiser, saved)
            for name, encoder in self.base.trainable_text_encoders.items() if self.trains_text else ():
                fill_adapter(encoder, saved.part(name))

    def origin(self, step: int) -> dict[str, Any]:
        """What saved weights record of their run: arguments of `write_adapter` and `save_whole_module`."""
        config = self.config
        notes = {**self.facts, "training steps": step, "seed": config.seed}
        return {"base_model": config.base_model, "revision": config.revision, "vae": config.vae, "notes": notes}

    @torch.no_grad()
    def validate(self, step: int, path: Path) -> dict[str, float]:
        """Generate the validation images and write them to `path`; return numbers by name, as `save_sheet`.

        Here a row per validation prompt. Trained weights stay as they are.
        """
        settings = self.config.validation
        n, resolution = settings.images_per_prompt, self.config.data.resolution
        jobs = jobs_for(settings.prompts, n)
        with self.encoders.sampling_mode(self.base.denoiser, *self.base.text_encoders.values()):
            pipeline = self.base.pipeline()
            sampled = sample_images(pipeline, jobs, settings.sampling, seed=settings.seed, resolution=resolution)
            images = [image for _, image in sampled]
        rows = [(prompt, images[k * n : (k + 1) * n]) for k, prompt in enumerate(settings.prompts)]
        return self.save_sheet(rows, images, step, path)

    def save_sheet(
        self, rows: Sequence[tuple[str, list[Image.Image]]], images: Sequence[Image.Image], step: int, path: Path
    ) -> dict[str, float]:
        """Write rows of images as one PNG that records the validation's settings.

        Returns:
            How many of the sampled `images` are all black, and how many NaN.
        """
        save_png(sheet(rows), path, {"step": step, **self.config.validation.model_dump(mode="json")})
        faults = [fault(image) for image in images]
        return {f"{kind}_images": float(faults.count(kind)) for kind in ("black", "nan")}

    def results(self, folder: RunFolder) -> list[str]:
        """Lines on where the trained weights are."""
        if self.config.trains_unet:
            return [f"UNet:    {folder.path / UNET.folder}"]
        return [f"Adapter: {folder.adapter}"] if self.config.adapter.peft_type else []

    def example(self, folder: RunFolder) -> list[str]:
        """Options of an `ether-diffusion generate` that generates from the run, next to `--adapter RUN`."""
        raise NotImplementedError


class DenoisingLoss(nn.Module):
    """The denoiser, the text encoders if they are trained too, and the loss: all that is trained, in one module.

    Its parts have their names in diffusers' pipelines, as `unet`.

    Args:
        trains_text: Whether text encoders are trained.
        prior_weight: Of the loss over class samples, as in `denoising_loss`.
    """

    def __init__(self, base: Base, trains_text: bool = False, prior_weight: float = 0.0) -> None:
        super().__init__()
        self.family, self.prior_weight = base.family, prior_weight
        self.add_module(base.family.denoiser, base.denoiser)
        self.trained_encoders = tuple(base.trainable_text_encoders) if trains_text else ()
        for name in self.trained_encoders:
            self.add_module(name, base.parts[name])
        self.frozen = {name: part for name, part in base.parts.items() if name not in self._modules}
        """Other parts of the base, in a dictionary: they are no modules of this one."""

    @property
    def denoiser(self) -> nn.Module:
        return self.get_submodule(self.family.denoiser)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses by name of a batch with the entries of `Task.noised` and `Task.text`."""
        noisy, conditioning = batch["noisy_latents"], batch
        if self.trained_encoders:
            found = self.family.encode({**self.frozen, **self._modules}, batch["tokens"])
            features = {n: t.to(noisy.dtype) if t.is_floating_point() else t for n, t in found.items()}
            conditioning = {**batch, **features}
        return self.losses(self.family.denoise(self.denoiser, noisy, batch["timesteps"], conditioning), batch)

    def losses(self, prediction: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses by name of a batch for which the denoiser predicts this."""
        return denoising_loss(
            prediction,
            batch["target"],
            batch["weights"],
            mask=batch.get("masks"),
            instances=batch.get("instances"),
            prior_weight=self.prior_weight,
        )
