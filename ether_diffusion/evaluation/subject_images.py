"""Images of subjects: found in folders, or generated from runs.

Subjects are folders, matched by their whole names. An image that the protocol does not ask for is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ether_diffusion.data.pair_files import list_images
from ether_diffusion.data.photos import Photo, find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.generation import SavedRun, generate, load_pipeline, read_run

from .galleries import BUILTIN, Gallery, gallery_of
from .image_records import LIST, common, read_list, run_facts
from .metric_kinds import RANKING
from .protocols import SubjectProtocol

DRIFT, BEFORE, AFTER = "drift", "before", "after"
"""Folders of a subject's images: the images of the prompts of `drift`, of the base and of the run."""
LAYOUT = (
    f"expected a folder for each subject, and in it {LIST} (as `ether-diffusion generate` writes it), or a folder for "
    "each prompt, named as the prompt or by its number in the protocol (00, 01, …)"
)


@dataclass(frozen=True)
class SubjectImages:
    """The photos and the generated images of one subject.

    Attributes:
        files: By template of the protocol, in the order of their names; fewer than it asks for, or none, where
            images are missing.
        identifier: The placeholder word in the images' prompts.
        facts: What the images record of how they were generated, as far as they agree.
        folder: The subject's, which holds the files.
        drift: By prompt of the protocol's `drift_prompts`, two images: before and after training. Empty without such
            prompts, or where they were not generated.
        gallery: Images of other individuals, for metrics that rank them; else empty.
    """

    name: str
    photos: tuple[Photo, ...]
    files: Mapping[str, tuple[Path, ...]]
    identifier: str
    facts: Mapping[str, Any]
    folder: Path = Path()
    drift: Mapping[str, tuple[Path, Path]] = field(default_factory=dict)
    gallery: Gallery = field(default_factory=dict)


@dataclass(frozen=True)
class SubjectRun:
    """A run folder or one of its checkpoints, and its subject in the protocol.

    Attributes:
        photos: The folder that it was trained on, or `builtin:SUBJECT`.
    """

    run: SavedRun
    subject: str
    identifier: str
    photos: str

    @property
    def method(self) -> str:
        return self.run.trained.method

    @property
    def real(self) -> str | Path:
        """What holds the photos of this subject and of others: `builtin:`, or the folder of its folder."""
        return BUILTIN if self.photos.startswith(BUILTIN) else Path(self.photos).parent


def photos_of(subject: str, real: str | Path) -> tuple[Photo, ...]:
    """A subject's photos in the order of their names. Raises UserError as `find_photos`."""
    return find_photos(f"{BUILTIN}{subject}" if str(real) == BUILTIN else Path(real) / subject).photos


def find_images(
    protocol: SubjectProtocol, images: str | Path, real: str | Path, identifier: str | None = None
) -> list[SubjectImages]:
    """The subjects that `images` has folders of, in the order of their names.

    Args:
        images: Holds SUBJECT/images.jsonl with the files that it lists, or SUBJECT/PROMPT/ with files.
        real: Holds SUBJECT/ with photos; `builtin:` for the miniature's own.
        identifier: The placeholder word in the images' prompts. Default: the protocol's.

    Raises:
        UserError: another layout; subjects or prompts that the protocol does not have; more images of a prompt than it
            takes; other generation settings than it states; no photos.
    """
    images = Path(images)
    if not images.is_dir():
        raise UserError(f"--images {images}: no such folder; {LAYOUT}.")
    folders = [entry for entry in sorted(images.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        raise UserError(f"--images {images}: no folders in it; {LAYOUT}.")
    for folder in folders:
        protocol.entry(folder.name, str(folder))
    found = [read_subject(protocol, folder, photos_of(folder.name, real), identifier) for folder in folders]
    return [with_gallery(protocol, one, real) for one in found]


def with_gallery(protocol: SubjectProtocol, images: SubjectImages, real: str | Path) -> SubjectImages:
    """The same images, with the gallery that the protocol's metrics rank, if any does."""
    if not protocol.has(*RANKING):
        return images
    return replace(images, gallery=gallery_of(protocol, images.name, real))


def read_subject(
    protocol: SubjectProtocol, folder: Path, photos: Sequence[Photo], identifier: str | None = None
) -> SubjectImages:
    """The images in one subject's folder. Raises UserError as `find_images`."""
    subject, word = folder.name, protocol.identifier if identifier is None else identifier
    templates = protocol.templates(subject)
    by_prompt = {protocol.prompt(subject, template, word): template for template in templates}
    has_list = (folder / LIST).is_file()
    rows = read_list(folder, protocol, ("file", "prompt")) if has_list else _folder_rows(folder, list(by_prompt))
    found: dict[str, list[Path]] = {template: [] for template in templates}
    for row in rows:
        if row["prompt"] not in by_prompt:
            raise UserError(
                f"{folder}: {row['file']}: {protocol.name} has no prompt {row['prompt']!r} for {subject} with "
                f"identifier {word!r}; expected one like {next(iter(by_prompt))!r}."
            )
        found[by_prompt[row["prompt"]]].append(folder / row["file"])
    for template, files in found.items():
        if len(files) > protocol.images_per_prompt or len(set(files)) < len(files):
            raise UserError(
                f"{folder}: {len(files)} images of {protocol.prompt(subject, template, word)!r}; {protocol.name} takes "
                f"{protocol.images_per_prompt}, each once."
            )
    present = {template: tuple(sorted(file for file in files if file.is_file())) for template, files in found.items()}
    drift = _read_drift(protocol, subject, folder / DRIFT)
    return SubjectImages(subject, tuple(photos), present, word, common(rows), folder, drift)


def _read_drift(protocol: SubjectProtocol, subject: str, folder: Path) -> dict[str, tuple[Path, Path]]:
    """The images of the protocol's `drift_prompts` before and after training, as far as both are there."""
    if not protocol.drift_prompts or not all((folder / when / LIST).is_file() for when in (BEFORE, AFTER)):
        return {}
    before, after = (
        {row["prompt"]: folder / when / row["file"] for row in read_list(folder / when, protocol, ("file", "prompt"))}
        for when in (BEFORE, AFTER)
    )
    both = [text for text in protocol.drift_texts(subject) if text in before and text in after]
    return {text: (before[text], after[text]) for text in both if before[text].is_file() and after[text].is_file()}


def find_run(protocol: SubjectProtocol, run: str | Path | SavedRun) -> SubjectRun:
    """Find the subject of a run in the protocol.

    Args:
        run: What `read_run` returned, or a path for it.

    Raises:
        UserError: not in a run folder; a base that the scorers cannot score; or a subject that the protocol lacks.
    """
    if not isinstance(run, SavedRun):
        run = read_run(run)
    path, saved, data = run.path, run.trained, run.config.get("data") or {}
    for key in ("instance_dir", "class_name", "identifier"):
        if not data.get(key):
            needed = f"no config.yaml that states 'data.{key}'; generate images, then give --images"
            raise UserError(f"{path} is not in a run folder: {needed}.")
    protocol.check_base(path, saved.base_model)
    photos = str(data["instance_dir"])
    subject = photos.removeprefix(BUILTIN) if photos.startswith(BUILTIN) else Path(photos).name
    entry = protocol.entry(subject, f"{path}: data.instance_dir {photos}")
    if data["class_name"] != entry.class_name:
        given, wanted = data["class_name"], entry.class_name
        raise UserError(f"{path}: data.class_name: {given!r}; {subject} is a {wanted!r} in {protocol.name}.")
    return SubjectRun(run, subject, data["identifier"], photos)


def generate_run(
    protocol: SubjectProtocol,
    run: SubjectRun,
    output: str | Path,
    *,
    real: str | Path | None = None,
    batch_size: int = 1,
    device: str | None = None,
) -> SubjectImages:
    """Generate the protocol's images of a run in OUTPUT/SUBJECT; complete ones are kept.

    Args:
        real: The folder of subjects' photos. Default: the photos that the run was trained on.

    Raises:
        UserError: the folder holds images of other settings, or there are no photos.
    """
    photos = find_photos(run.photos).photos if real is None else photos_of(run.subject, real)
    folder = Path(output) / run.subject
    pipeline, _ = load_pipeline(run.run, device=device, resolution=protocol.resolution)
    options: dict[str, Any] = {
        "seed": protocol.seed,
        "sampling": protocol.sampling,
        "resolution": protocol.resolution,
        "batch_size": batch_size,
    }
    record = run_facts(run.run, pipeline)
    prompts = [protocol.prompt(run.subject, template, run.identifier) for template in protocol.templates(run.subject)]
    generate(pipeline, prompts, folder, images_per_prompt=protocol.images_per_prompt, record=record, **options)
    if protocol.drift_prompts:
        texts = protocol.drift_texts(run.subject)
        generate(pipeline, texts, folder / DRIFT / AFTER, record=record, **options)
        del pipeline  # one at a time in the device's memory
        pipeline, _ = load_pipeline(
            None,
            base_model=run.run.base_model,
            revision=run.run.revision,
            vae=run.run.vae,
            device=device,
            resolution=protocol.resolution,
        )
        record = {key: record[key] for key in ("base_model", "base_sha256")}
        generate(pipeline, texts, folder / DRIFT / BEFORE, record=record, **options)
    images = read_subject(protocol, folder, photos, run.identifier)
    return with_gallery(protocol, images, run.real if real is None else real)


def recorded_settings(subjects: Sequence[SubjectImages]) -> dict[str, Any]:
    """Facts that all images share, and adapters' digests by subject. Raises UserError as `check_one_method`."""
    check_one_method({one.name: one.facts for one in subjects})
    facts = [dict(one.facts) for one in subjects]
    adapters = {one.name: str(one.facts["adapter"]) for one in subjects if one.facts.get("adapter")}
    shared = {k: v for k, v in facts[0].items() if k != "adapter" and all(other.get(k) == v for other in facts)}
    words = sorted({one.identifier for one in subjects})
    return {**shared, "identifier": words[0] if len(words) == 1 else words, "adapters": adapters}


def check_one_method(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to average over subjects of several methods or bases; unrecorded facts are not compared.

    Raises:
        UserError: two subjects were generated with bases of different weights, or by different methods.
    """
    for key in ("base_sha256", "method"):
        known = {subject: str(found[key]) for subject, found in facts.items() if found.get(key) is not None}
        for subject, value in known.items():
            first, other = next(iter(known.items()))
            if value == other:
                continue
            if key == "method":
                raise UserError(f"{first} and {subject} were generated by different methods: {other} and {value}.")
            digests = f"(digests {other[:12]} and {value[:12]})"
            raise UserError(f"{first} and {subject} were generated with bases of different weights {digests}.")


def _folder_rows(folder: Path, prompts: list[str]) -> list[dict[str, Any]]:
    """Rows for images in folders that are named by prompt or number."""
    stray, inner = list_images(folder), [entry for entry in sorted(folder.iterdir()) if entry.is_dir()]
    if stray or not inner:
        found = f"{len(stray)} images without prompts" if stray else "nothing"
        raise UserError(f"{folder}: holds {found}; {LAYOUT}.")
    numbers = {f"{k:02d}": prompt for k, prompt in enumerate(prompts)}
    return [
        {"file": f"{entry.name}/{file.name}", "prompt": numbers.get(entry.name, entry.name)}
        for entry in inner
        if not entry.name.startswith(".") and entry.name != DRIFT
        for file in list_images(entry).values()
    ]
