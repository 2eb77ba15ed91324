"""The folder that a run is published as on the hub: adapter, model card, sample images, and the same as a LoRA file."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ether_diffusion.adapters.low_rank import FullRankError
from ether_diffusion.adapters.saved_adapter import BEFORE, TEXT_ENCODERS, VAE, WEIGHTS, SavedAdapter
from ether_diffusion.errors import UserError
from ether_diffusion.files import CHECKPOINTS, step_of
from ether_diffusion.generation import SavedRun, read_run
from ether_diffusion.generation.folders import LIST
from ether_diffusion.generation.saved_run import CONFIG as RUN_CONFIG
from ether_diffusion.hub import check_can_push, check_repository, is_hub_base, push_files
from ether_diffusion.input_files import read_bytes, read_text
from ether_diffusion.model_card import carrier_of
from ether_diffusion.models.bases import DEFAULT_BASE, TINY
from ether_diffusion.own_files import check_own, is_own, write_own
from ether_diffusion.pictures import sheet

from .export_run import export
from .hub_card import CardFacts, hub_card, shown_base
from .origin_checks import check_certified

SAMPLES, ENCODER, GRID = "samples", "condition_encoder", "grid.png"
OWNED = (*TEXT_ENCODERS, BEFORE, SAMPLES, ENCODER, VAE, RUN_CONFIG)
"""What an earlier push may have left in a repository, and this one would not replace."""
MOST_SAMPLES = 6

_LICENSES = {
    DEFAULT_BASE: "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    TINY: "apache-2.0",
}
"""The hub's names of bases' licences, whose terms bind what is made of them."""
_PUBLIC_SETTINGS = {
    "adapter": ("method", "variant", "num_blocks", "sides", "rank", "alpha", "target", "text_encoder"),
    "data": ("instance_prompt", "class_prompt", "identifier", "class_name", "resolution", "condition", "crop"),
    "training": ("steps", "learning_rate", "batch_size", "gradient_accumulation", "optimizer", "schedule"),
}
"""Of a run's config what is published. Paths of the machine that trained it are not."""


@dataclass(frozen=True)
class HubFolder:
    """What `write_hub_folder` wrote."""

    path: Path
    title: str
    """What it holds, in words."""
    files: Mapping[str, Path]
    """By their paths in the repository."""
    notes: tuple[str, ...] = ()
    """What others cannot do with it, and why."""


def push(
    run: str | Path | SavedRun,
    repository: str,
    output: str | Path | None = None,
    *,
    license: str | None = None,
    base_model: str | None = None,
    uncertified: bool = False,
    private: bool = False,
    dry_run: bool = False,
) -> list[str]:
    """Publish a run on the hub: write its folder, and push that in one commit.

    Args:
        run, repository, output, license, base_model, uncertified: As for `write_hub_folder`.
        private: Of a repository that is made.
        dry_run: Write the folder alone.

    Returns:
        Lines about it for people, the repository's address last.

    Raises:
        UserError: as `write_hub_folder` and `hub.check_can_push`; what the hub has is then as it was.
    """
    if not dry_run:
        check_can_push(repository)  # before the base is loaded
    options: dict[str, Any] = {"license": license, "base_model": base_model, "uncertified": uncertified}
    folder = write_hub_folder(run, repository, output, **options)
    lines = [*(f"note: {note}" for note in folder.notes), f"{len(folder.files)} files in {folder.path}"]
    if dry_run:
        return [*lines, f"Dry run: nothing was pushed to {repository}."]
    message = f"Push {folder.title}"
    return [*lines, push_files(repository, folder.files, owned=OWNED, message=message, private=private)]


def write_hub_folder(
    run: str | Path | SavedRun,
    repository: str,
    output: str | Path | None = None,
    *,
    license: str | None = None,
    base_model: str | None = None,
    uncertified: bool = False,
) -> HubFolder:
    """Write the folder that a run is published as. A rerun replaces what it wrote and nobody has changed since.

    Args:
        run: A run, a checkpoint or a PEFT folder, or what `read_run` returned.
        repository: USER/NAME; the LoRA file gets the name.
        output: The folder; default: `hub` in the run's folder.
        license: The hub's name of a licence; default: that of the base, if it is known here.
        base_model: The base, where the recorded one is elsewhere on this machine.
        uncertified: Publish weights that failed their certificate.

    Raises:
        UserError: no adapter there, or one that is marked as not certified; a base that is not found; or a file in the
            folder that is not ours.
    """
    check_repository(repository)
    run = run if isinstance(run, SavedRun) else read_run(run)
    saved = run.trained
    if not isinstance(saved, SavedAdapter):
        raise UserError(
            f"{saved.folder} is a whole {saved.kind.what}, not an adapter. Export it with --format merged, and upload "
            "that folder with `hf upload`."
        )
    if not uncertified:
        check_certified(run)
    name = repository.partition("/")[2]
    folder = Path(output) if output else _default_folder(run, name)
    lora_name, notes = f"{name}.safetensors", []
    contents = dict(_adapter_files(saved, run.condition_encoder))
    samples, sample_files = _samples(run, saved)
    contents |= sample_files
    if run.config:
        contents[RUN_CONFIG] = _public_config(run.config)
    if lora_name in contents:
        lora_name = f"{name}_lora.safetensors"
    names = [*contents, lora_name, "README.md"]
    check_own(*(folder / file for file in names))  # before the base is loaded
    try:
        contents[lora_name] = _lora_file(run, lora_name, base_model, uncertified)
    except FullRankError as error:
        notes.append(f"no LoRA file for other programs: {error}")
    base = saved.base_model or ""
    if not is_hub_base(base) and base != TINY:
        notes.append(f"the base {base} is not one of the hub's: others name theirs with --base-model")
    if not sample_files:
        notes.append(f"no sample images: `ether-diffusion generate --adapter {run.path} --prompt …` makes some")
    licence = license or _LICENSES.get(base)
    if licence is None:
        notes.append("the base's licence is not known here: the card says `unknown`; --license names it")
    lora = lora_name if lora_name in contents else None
    facts = CardFacts(repository, run, saved, samples, licence or "unknown", lora)
    contents["README.md"] = hub_card(facts).encode("utf-8")
    for file, content in contents.items():
        write_own(folder / file, content)
    for path in list(folder.rglob("*")):  # what an earlier call wrote and this one did not
        if path.is_file() and path.relative_to(folder).as_posix() not in contents and is_own(path):
            path.unlink()
    title = f"{saved.method} adapter for {shown_base(base)}"
    return HubFolder(folder, title, {file: folder / file for file in contents}, tuple(notes))


def _default_folder(run: SavedRun, name: str) -> Path:
    root = _root(run)
    return root / "hub" if (root / RUN_CONFIG).is_file() else Path("hub") / name


def _root(run: SavedRun) -> Path:
    """The run's folder, whichever part of it was named."""
    path = _part(run)
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


def _part(run: SavedRun) -> Path:
    """The run's folder, or a checkpoint's in it."""
    return run.path.parent if run.path.name == "adapter" else run.path


def _adapter_files(saved: SavedAdapter, encoder: Path | None) -> Iterator[tuple[str, bytes]]:
    """The adapter's files at the top, where PEFT looks for them, and a condition encoder's in a folder of its own."""
    folder = saved.folder
    paths = [path for path in folder.glob("*.json") if path.is_file()]
    paths += [folder / WEIGHTS, *(path for part in (*TEXT_ENCODERS, BEFORE) for path in (folder / part).rglob("*"))]
    yield from ((path.relative_to(folder).as_posix(), read_bytes(path)) for path in paths if path.is_file())
    if encoder is not None:
        yield from (
            (f"{ENCODER}/{path.relative_to(encoder).as_posix()}", read_bytes(path))
            for path in sorted(encoder.rglob("*"))
            if path.is_file()
        )


def _samples(run: SavedRun, saved: SavedAdapter) -> tuple[list[tuple[str, str]], dict[str, bytes]]:
    """Prompts and names of sample images, and their contents, with a grid of them.

    They are those that `generate` made with this adapter in the run's folder; without any, the last sheet of the
    validation, or that of the checkpoint's step.
    """
    root, found = _root(run), list[tuple[str, Path]]()
    for listing in sorted((root / "images").rglob(LIST)):
        for row in _rows(listing):
            path = listing.parent / str(row.get("file"))
            if row.get("adapter") == saved.digest and row.get("scale") == 1 and not row.get("fault") and path.is_file():
                found.append((str(row.get("prompt")), path))
    first = list({prompt: (prompt, path) for prompt, path in reversed(found)}.values())[::-1]
    chosen = [*first, *(each for each in found if each not in first)][:MOST_SAMPLES]
    named = [(prompt, f"{SAMPLES}/{k}.png", path) for k, (prompt, path) in enumerate(chosen)]
    files = {name: read_bytes(path) for _, name, path in named}
    sheets = {step_of(path.with_suffix("")): path for path in (root / "samples").glob("*.png")}
    steps = [step for step in sheets if step is not None and step_of(_part(run)) in (None, step)]
    if steps:
        files[f"{SAMPLES}/{GRID}"] = read_bytes(sheets[max(steps)])
    elif named:
        files[f"{SAMPLES}/{GRID}"] = _png(sheet([(prompt, [path]) for prompt, _, path in named]))
    prompts = (run.config.get("validation") or {}).get("prompts") or [""]
    samples = [(prompt, name) for prompt, name, _ in named] or [(str(prompts[0]), f"{SAMPLES}/{GRID}")]
    return (samples if files else []), files


def _rows(listing: Path) -> list[dict[str, Any]]:
    """The rows of a list of generated images; none of one that is damaged."""
    try:
        rows = [json.loads(line) for line in read_text(listing).splitlines()]
    except ValueError:
        return []
    return [row for row in rows if isinstance(row, dict)]


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _public_config(config: Mapping[str, Any]) -> bytes:
    """The settings of a run that name nothing of the machine that it ran on."""
    public: dict[str, Any] = {key: config[key] for key in ("seed",) if key in config}
    for section, keys in _PUBLIC_SETTINGS.items():
        values = config.get(section) or {}
        public[section] = {key: values[key] for key in keys if values.get(key) is not None}
    return yaml.safe_dump(public, sort_keys=False, allow_unicode=True).encode("utf-8")


def _lora_file(run: SavedRun, name: str, base_model: str | None, uncertified: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        saved: Any = run.adapter
        is_transformer = carrier_of(saved.tensors)[0].endswith("transformer")
        kind = "diffusers" if is_transformer else "kohya"
        file = Path(folder) / (name if kind == "kohya" else "lora")
        export(run, kind, file, base_model=base_model, uncertified=uncertified)
        return (next(file.glob("*.safetensors")) if is_transformer else file).read_bytes()
