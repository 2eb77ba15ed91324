"""The config of a DreamBooth run, and the defaults that depend on other settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ether_diffusion.adapters.methods import AdapterSettings, EtherPlusSettings
from ether_diffusion.config import Settings
from ether_diffusion.data.photo_dataset import dreambooth_prompts
from ether_diffusion.generation import Sampling
from ether_diffusion.limits import Count, Many, Seed, Share, Side, Strength

from .config import TaskConfig, ValidationSettings, resolve_training

NAME = "dreambooth"


class PriorSettings(Settings):
    """Prior preservation: images of other members of the class keep the class from collapsing into the subject."""

    weight: Strength = 1.0
    num_images: Many = 200
    class_dir: Path | None = None
    """A folder with your own class images; null: the base model generates them, once, into `cache_dir`."""
    cache_dir: Path | None = None
    """Default: `~/.cache/ether_diffusion/class_images`, with a folder for every base, prompt, seed and sampler."""
    seed: Seed = 0
    sampling: Sampling = Sampling()


class SubjectSettings(Settings):
    """One subject."""

    instance_dir: str
    """A folder with 3 to 6 photos of the subject."""
    class_name: str = Field(min_length=1)
    """The subject's category, such as dog, backpack or toy, as in `a photo of qwe {class_name}`."""
    identifier: str = Field(default="qwe", min_length=1)
    """The placeholder word for the subject: a rare one."""
    instance_prompt: str | None = None
    """Default: `a photo of {identifier} {class_name}`."""
    class_prompt: str | None = None
    """Default: `a photo of {class_name}`."""
    masks: Path | None = None
    """A folder of grey masks with the photos' names: white counts fully in the loss, black not at all."""

    def resolved(self) -> SubjectSettings:
        """The settings with their prompts filled in."""
        instance, of_class = dreambooth_prompts(self.identifier, self.class_name)
        prompts = {
            "instance_prompt": self.instance_prompt or instance,
            "class_prompt": self.class_prompt or of_class,
        }
        return self.model_copy(update=prompts)


class DataSettings(SubjectSettings):
    """The subject, and how samples are made from it."""

    more_subjects: tuple[SubjectSettings, ...] = ()
    """Other subjects to learn in the same run, each with its own identifier."""
    resolution: Side = 512
    """Side of the square crops in pixels; a multiple of 8."""
    crop: Literal["random", "center", "bucket"] = "random"
    """Squares at random places or in the centre; or, `bucket`, the shape nearest to each photo's, hardly cropped."""
    bucket_factor: Side = 64
    """Sides of buckets are multiples of this; their area is at most resolution squared."""
    crops_per_photo: Count | None = None
    """With random crops: use this many fixed places per photo, so that they can be cached; null: any place."""
    horizontal_flip: bool = False
    captions: bool = False
    """Take a photo's prompt from the text file of the same name, `IMG_1.txt` next to `IMG_1.jpg`, if there is one."""
    caption_dropout: Share = 0.0
    """Probability that a sample's prompt is empty."""
    cache: bool = False
    """Encode images and prompts once and keep them on disk; VAE and text encoder then leave memory. Needs fixed
    crops."""
    cache_dir: Path | None = None
    """Default: `~/.cache/ether_diffusion/encoded`."""
    prior: PriorSettings | None = PriorSettings()
    """null: no prior preservation."""


class DreamBoothConfig(TaskConfig):
    """All settings of a DreamBooth run."""

    adapter: AdapterSettings = EtherPlusSettings()
    data: DataSettings
    validation: ValidationSettings = ValidationSettings()

    @property
    def subjects(self) -> tuple[SubjectSettings, ...]:
        """The first subject and the others."""
        return (self.data, *self.data.more_subjects)

    @model_validator(mode="after")
    def _check_cache(self) -> DreamBoothConfig:
        if self.data.cache and self.data.crop == "random" and self.data.crops_per_photo is None:
            raise ValueError("data.cache needs fixed crops: data.crops_per_photo=8, or data.crop=center or bucket")
        return self

    @model_validator(mode="after")
    def _check_subjects(self) -> DreamBoothConfig:
        names = [(subject.identifier, subject.class_name) for subject in self.subjects]
        if len(set(names)) < len(names):
            raise ValueError("data.more_subjects: two share identifier and class_name; give each its own identifier")
        if self.data.more_subjects and self.data.prior is not None and self.data.prior.class_dir is not None:
            raise ValueError(
                "data.prior.class_dir holds images of one class; leave it out with more_subjects: class images are "
                "then generated"
            )
        return self


def resolve(config: DreamBoothConfig) -> DreamBoothConfig:
    """Fill in the defaults that depend on other settings: the learning rate, the checkpoints to keep and the prompts.

    Raises:
        UserError: the method does not serve this task.
    """
    training = resolve_training(config.adapter, config.training, NAME)
    others = tuple(subject.resolved() for subject in config.data.more_subjects)
    data = config.data.resolved().model_copy(update={"more_subjects": others})
    return config.model_copy(update={"training": training, "data": data})
