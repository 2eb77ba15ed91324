"""Runs under a protocol: draws a run's subject from the protocol's prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.data.photos import find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.generation import generate, load_pipeline, read_run

from .base_digest import base_digest, base_of
from .protocols import SubjectProtocol
from .subject_images import BUILTIN, SubjectImages, photos_of, read_subject


@dataclass(frozen=True)
class Run:
    """A run folder or one of its checkpoints, and its subject's name in the protocol."""

    path: Path
    subject: str
    identifier: str
    photos: str
    """The folder that it was trained on."""
    method: str


def find_run(protocol: SubjectProtocol, path: str | Path) -> Run:
    """What a run says of itself.

    Raises:
        UserError: no run folder; another base than the judges know; a subject that the protocol does not have.
    """
    run = read_run(path)
    saved, data = run.trained, run.config.get("data", {})
    if not data.get("instance_dir"):
        raise UserError(f"{path} lies in no run folder, whose config.yaml names its subject; draw, then give --images.")
    if protocol.base_model not in (None, saved.base_model):
        known = f"the judges of {protocol.name} know base {protocol.base_model!r} alone"
        raise UserError(f"{path}: trained on {saved.base_model}; {known}.")
    photos = str(data["instance_dir"])
    subject = photos.removeprefix(BUILTIN) if photos.startswith(BUILTIN) else Path(photos).name
    entry = protocol.entry(subject, f"{path}: data.instance_dir {photos}")
    if data["class_name"] != entry.class_name:
        given, wanted = data["class_name"], entry.class_name
        raise UserError(f"{path}: data.class_name: {given!r}; {subject} is a {wanted!r} in {protocol.name}.")
    return Run(Path(path), subject, data["identifier"], photos, saved.method)


def generate_run(
    protocol: SubjectProtocol,
    run: Run,
    output: str | Path,
    *,
    real: str | Path | None = None,
    batch_size: int = 1,
    device: str | None = None,
) -> SubjectImages:
    """Draw the protocol's images of a run into OUTPUT/SUBJECT; complete ones are kept.

    Args:
        real: The folder of subjects' photos; default: those that the run was trained on.

    Raises:
        UserError: the folder holds images that were made otherwise, or there are no photos.
    """
    photos = find_photos(run.photos).photos if real is None else photos_of(run.subject, real)
    folder = Path(output) / run.subject
    pipeline, saved = load_pipeline(run.path, device=device, resolution=protocol.resolution)
    assert saved is not None
    record = {
        "base_model": saved.base_model,
        "base_sha256": base_digest(base_of(pipeline, saved)),
        "method": saved.method,
        "parameters": saved.parameters,
        "adapter": saved.digest,
    }
    generate(
        pipeline,
        [protocol.prompt(run.subject, template, run.identifier) for template in protocol.templates(run.subject)],
        folder,
        images_per_prompt=protocol.images_per_prompt,
        seed=protocol.seed,
        sampling=protocol.sampling,
        resolution=protocol.resolution,
        batch_size=batch_size,
        record=record,
    )
    return read_subject(protocol, folder, photos, run.identifier)


def recorded_settings(subjects: Sequence[SubjectImages]) -> dict[str, Any]:
    """What the images say of their making: what all say alike, and the adapters' digests by subject.

    Raises:
        UserError: as `check_one_method`.
    """
    check_one_method({one.name: one.facts for one in subjects})
    facts = [dict(one.facts) for one in subjects]
    adapters = {one.name: str(one.facts["adapter"]) for one in subjects if one.facts.get("adapter")}
    alike = {k: v for k, v in facts[0].items() if k != "adapter" and all(other.get(k) == v for other in facts)}
    words = sorted({one.identifier for one in subjects})
    return {**alike, "identifier": words[0] if len(words) == 1 else words, "adapters": adapters}


def check_one_method(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """An average over subjects speaks of one method on one base. What images do not tell is not held against them.

    Args:
        facts: By subject.

    Raises:
        UserError: two subjects were drawn from bases with different weights, or by different methods.
    """
    for key in ("base_sha256", "method"):
        told = {subject: str(found[key]) for subject, found in facts.items() if found.get(key) is not None}
        for subject, value in told.items():
            first, other = next(iter(told.items()))
            if value == other:
                continue
            if key == "method":
                raise UserError(f"{first} and {subject} were drawn by different methods: {other} and {value}.")
            digests = f"(digests {other[:12]} and {value[:12]})"
            raise UserError(f"{first} and {subject} were drawn from bases with different weights {digests}.")
