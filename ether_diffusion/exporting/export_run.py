"""A run's adapter written for other programs, read back, and compared with what it does to the base."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ether_diffusion.adapters.base_digest import base_digest
from ether_diffusion.adapters.low_rank import LowRank
from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.adapters.weight_sum import MERGE_ROUNDING, ROUNDING, Addends, Source, add_up, concatenated, dense
from ether_diffusion.errors import Notice, UserError
from ether_diffusion.files import check_free, whole_file, whole_folder, write_whole
from ether_diffusion.generation import SavedRun, SummedRuns, load_pipeline, read_run, read_sum
from ether_diffusion.generation.pipelines import DTYPES, check_scale
from ether_diffusion.generation.summed_runs import Named
from ether_diffusion.hub import local_copy
from ether_diffusion.models.bases import Base, load_base
from ether_diffusion.models.families.table import DEFAULT, family_of
from ether_diffusion.version import __version__

from .lora_files import Changes, read_back, tensor_bytes, write_diffusers, write_kohya, write_peft
from .origin_checks import check_certified, check_same_base
from .original_file import original_tensors

FORMATS = ("kohya", "diffusers", "peft", "merged")

_ROUNDING = {"fp32": ROUNDING, "fp16": 2e-3, "bf16": 2e-2}
"""How far the written change of a weight may be from the true one, relative to its norm."""
_NOTHING = 1e-7
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    files: tuple[Path, ...]
    layers: int = 0
    """Number of changed weights; 0 for `merged`."""
    ranks: tuple[int, ...] = ()
    """The ranks that occur, ascending; empty for `merged`."""
    error: float = 0.0
    """How far the written changes are from the adapter's, relative, over all layers; 0 for `merged`."""
    strength: float = 0.0
    """Norm of all changes relative to that of the weights that they change; 0 for `merged`."""
    notes: tuple[str, ...] = field(default=())
    """What other programs cannot know from the files."""


def export(
    run: str | Path | SavedRun | Sequence[tuple[Named, float]],
    format: str = "kohya",
    output: str | Path = "",
    *,
    dtype: str = "fp16",
    max_rank: int | None = None,
    scale: float = 1.0,
    base_model: str | None = None,
    allow_pickle: bool = False,
    force_base: bool = False,
    uncertified: bool = False,
) -> Exported:
    """Write a run's adapter for programs that do not know its method.

    ETHER's change of a weight has rank n a side, ETHER+'s 2n, and LoRA files hold it exactly; on k x k convolutions the
    input side takes k^2 times that.

    Args:
        run: A run, a checkpoint or a PEFT folder, a repository of the hub, or what `read_run` returned. Or several of
            these and LoRA files, each with its strength: `[("runs/a", 0.8), ("b.safetensors", 0.5)]`. Their changes of
            the base's weights add up.
        format: `kohya`: one file with the keys that ComfyUI, A1111, InvokeAI and diffusers read. `diffusers`: a folder
            for `load_lora_weights`. `peft`: a LoRA folder of PEFT. `merged`: the whole model with the adapter merged,
            a folder in diffusers' layout, or a single file in the original one where `output` ends in `.safetensors`.
        output: A `.safetensors` file for `kohya`, a new folder for the others.
        dtype: Of the written weights: fp32, fp16 or bf16. They are computed in fp32.
        max_rank: Truncate each change to this rank, the nearest one in the Frobenius norm; `Exported.error` says how
            near.
        scale: The adapter's strength, written into the file: 0 is the base, 1 as trained. A factor of the strengths
            of several.
        base_model: The base, where the recorded one is elsewhere on this machine.
        allow_pickle: Let a `.ckpt` run code of its own while it is read.
        force_base: Take a base whose weights are not those that the adapter was trained on.
        uncertified: Export weights that failed their certificate.

    Raises:
        UserError: no adapter there; an unknown format; an output of the wrong kind or that exists; a method whose
            changes have full rank, for a LoRA format; a base that is not found, does not fit, or is another one than
            the adapter's; weights that are marked as not certified.
        OSError: the output cannot be written, or what was read back is not what the adapter does. Nothing is left then.
    """
    output = _check_output(format, output)
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    if max_rank is not None and (max_rank < 1 or format == "merged"):
        raise UserError(f"--max-rank {max_rank}: expected a number from 1, and a format other than merged.")
    if not isinstance(run, SavedRun):
        run = read_run(local_copy(run)) if isinstance(run, (str, Path)) else read_sum(run)
    for one in () if uncertified else run.runs:
        check_certified(one)
    if (encoder := _encoder_target(run, output)) is not None:
        check_free(encoder, "--output", "Choose another name, or empty that folder.")
    if format == "merged":
        return _merged(run, output, dtype, scale, base_model, allow_pickle, force_base)
    sources = _sources(run, scale)
    name = base_model or run.base_model
    if not name:
        raise UserError("No base model: the adapter does not name one. Name it with --base.")
    base = load_base(name, revision=run.revision_of(name), allow_pickle=allow_pickle)
    if not force_base:
        _check_base(run, base)
    if format == "kohya" and not base.family.kohya_prefixes:
        raise UserError(
            f"--format kohya: {base.name} is of the family {base.family.title}, whose pipelines read other keys; take "
            "--format diffusers, a folder for load_lora_weights."
        )
    models = base.adaptable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # `Exported.notes` says so
        total = add_up(models, sources, low_rank=True)
    exact = {part: {layer: concatenated(own) for layer, own in layers.items()} for part, layers in total.items()}
    kept = exact if max_rank is None else {part: _truncated(layers, max_rank) for part, layers in exact.items()}
    facts = _metadata(run, base, output, kept, scale)
    with _new(output) as partial:
        if format == "kohya":
            write_kohya(partial, kept, DTYPES[dtype], facts, base.family.kohya_prefixes)
        elif format == "diffusers":
            write_diffusers(partial, kept, DTYPES[dtype], {"format": "pt"})
        else:
            write_peft(partial, kept, DTYPES[dtype], name)
        written = read_back(partial, format, kept, base.family.kohya_prefixes)
        error, strength = _compare(written, total, models, output, None if max_rank else _ROUNDING[dtype])
    encoder = _copy_encoder(run, output)
    ranks = sorted({change.rank for layers in kept.values() for change in layers.values()})
    notes = (
        () if strength > _NOTHING else (f"the adapter changes the weights by {strength:.1e} of their norm: nothing",)
    )
    return Exported((output, *encoder), sum(map(len, kept.values())), tuple(ranks), error, strength, notes)


def _merged(
    run: SavedRun,
    output: Path,
    dtype: str,
    scale: float,
    base_model: str | None,
    allow_pickle: bool,
    force_base: bool,
) -> Exported:
    """The whole model with the adapter merged into its weights."""
    if base_model is not None and not force_base:
        _check_base(run, load_base(base_model, allow_pickle=allow_pickle))
    has_change = run.adapter is not None or isinstance(run, SummedRuns)
    plain = dataclasses.replace(run, condition_encoder=None) if has_change else run
    merges = isinstance(run.adapter, SavedAdapter)  # those of several are merged in any case
    options: Any = {"base_model": base_model, "allow_pickle": allow_pickle, "device": "cpu", "dtype": "fp32"}
    pipeline, _ = load_pipeline(plain, scale=scale, merged=merges and scale != 0, **options)
    notes, family = [], family_of(pipeline)
    if output.suffix == _SUFFIX and not family.original_layout:
        raise UserError(
            f"--output {output}: single files are written of {DEFAULT.title}, and this base is of {family.title}; give "
            "a new folder."
        )
    if output.suffix == _SUFFIX:
        if pipeline.scheduler.config["prediction_type"] != "epsilon":
            notes.append("the base predicts v, which a single file cannot say: set it in the program that reads it")
        tensors = original_tensors(pipeline, DTYPES[dtype])
        with whole_file(output) as partial:
            write_whole(partial, tensor_bytes(tensors, {"format": "pt"}))
            _check_same(output, [partial], tensors)
    else:
        with whole_folder(output) as partial:
            pipeline.to(DTYPES[dtype]).save_pretrained(partial)
            for part in family_of(pipeline).modules:
                if getattr(pipeline, part) is None:
                    continue
                weights = getattr(pipeline, part).state_dict()
                _check_same(output / part, sorted((partial / part).glob("*.safetensors")), weights)
    return Exported((output, *_copy_encoder(run, output)), notes=tuple(notes))


def _check_same(output: Path, files: Sequence[Path], tensors: Mapping[str, torch.Tensor]) -> None:
    """Read tensors back one by one, and compare them bit for bit. Raises OSError: one is not what was written."""
    # Versions of transformers from 5.6 have no `text_model` in a module's names, and write it into files.
    left = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    found_here = set()
    for file in files:
        with safe_open(file, "pt") as found:
            for key in found.keys():  # noqa: SIM118
                written = left.pop(key.removeprefix("text_model."), None)
                if written is None or not torch.equal(found.get_tensor(key), written):
                    raise OSError(f"{output}: {key} that was read back is not what was written.")
                found_here.add(written.data_ptr())
    # Of tensors that are one, as T5's embeddings, transformers writes one.
    left = {key: tensor for key, tensor in left.items() if tensor.data_ptr() not in found_here}
    if left:
        raise OSError(f"{output}: {min(left)} that was written is not there.")


def _check_output(format: str, output: str | Path) -> Path:
    if format not in FORMATS:
        raise UserError(f"--format {format}: expected one of {', '.join(FORMATS)}.")
    path, file = Path(output), Path(output).suffix == _SUFFIX
    if file != (format == "kohya") and format != "merged":
        expected = "a file that ends in .safetensors" if format == "kohya" else "a folder"
        raise UserError(f"--output {output}: expected {expected} for --format {format}.")
    if file and path.exists():
        raise UserError(f"--output {output} exists; choose another name, or remove it.")
    if not file:
        check_free(path, "--output", "Choose another folder, or empty it.")
    return path


def _sources(run: SavedRun, scale: float) -> list[tuple[Source, float]]:
    """What is to be in the file, each with its strength."""
    if isinstance(run, SummedRuns) and run.changes:
        return [(source, scale * strength) for source, strength in run.changes]
    saved = run.trained
    if not isinstance(saved, SavedAdapter):
        raise UserError(f"{saved.folder} is a whole {saved.kind.what}, not an adapter. Take --format merged.")
    check_scale(saved, scale)
    return [(saved, scale)]


def _check_base(run: SavedRun, base: Base) -> None:
    """Refuse another base than that of a run's adapter, or of one of several. Raises UserError."""
    for one in run.runs:
        if isinstance(one.adapter, SavedAdapter):
            check_same_base(one.adapter, base)


def _truncated(layers: Mapping[str, LowRank], rank: int) -> dict[str, LowRank]:
    return {layer: change.truncated(rank).balanced() for layer, change in layers.items()}


@torch.no_grad()
def _compare(
    written: Changes, total: Addends, models: Mapping[str, nn.Module], output: Path, tolerance: float | None
) -> tuple[float, float]:
    """Compare what was read back with the changes of the weights, layer by layer.

    Args:
        tolerance: Largest error of a change, relative to its norm, or the norms of its addends; None: any.

    Returns:
        The error of all changes, relative to their norm, and their norm, relative to that of the weights.

    Raises:
        OSError: a change is further off.
    """
    errors = changes = weights = 0.0
    for part, layers in total.items():
        for name, own in layers.items():
            addends, weight = dense(own), models[part].get_parameter(f"{name}.weight")
            change = torch.stack(addends).sum(dim=0)
            error, norm, size = (float(t.norm()) for t in (written[part][name].dense() - change, change, weight))
            largest = sum(float(addend.norm()) for addend in addends)  # they may cancel
            if tolerance is not None and error > tolerance * largest + MERGE_ROUNDING * size:
                raise OSError(f"{output}: the change of {name} that was read back is not the adapter's.")
            errors, changes, weights = errors + error**2, changes + norm**2, weights + size**2
    return (errors / changes) ** 0.5 if changes else 0.0, (changes / weights) ** 0.5


def _metadata(run: SavedRun, base: Base, output: Path, changes: Changes, scale: float) -> dict[str, str]:
    """What ComfyUI, A1111 and their relatives show of a LoRA file, and where it comes from."""
    ranks = [change.rank for layers in changes.values() for change in layers.values()]
    training = {} if isinstance(run, SummedRuns) else run.config.get("training") or {}
    data = [own for one in run.runs if (own := one.config.get("data"))]
    trigger = ", ".join(str(own["instance_prompt"]) for own in data if own.get("instance_prompt")) or None
    resolution = next((own["resolution"] for own in data if own.get("resolution")), base.resolution)
    if isinstance(run, SummedRuns):
        methods = (source.method if isinstance(source, SavedAdapter) else "LoRA" for source, _ in run.changes)
        method, what = ", ".join(methods), "sum of changes"
        origin = {"ether_diffusion.weight_changes": json.dumps(run.record(scale))}
    else:
        method, what = run.trained.method, "adapter"
        origin = {"ether_diffusion.adapter_digest": run.trained.digest, "ether_diffusion.scale": f"{scale:g}"}
    values = {
        **base.family.kohya_facts(base.prediction_type),
        "ss_sd_model_name": base.name,
        "ss_output_name": output.stem,
        "ss_network_module": "networks.lora",
        "ss_network_dim": max(ranks),
        "ss_network_alpha": max(ranks),
        "ss_network_args": json.dumps({"conv_dim": max(ranks)} if len({*ranks}) > 1 else {}),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_max_train_steps": training.get("steps"),
        "ss_learning_rate": training.get("learning_rate"),
        "ss_tag_frequency": json.dumps({output.stem: {trigger: 1}}) if trigger else None,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": output.stem,
        "modelspec.trigger_phrase": trigger,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.description": f"{method} {what} for {base.name} as a LoRA.",
        "ether_diffusion.version": __version__,
        "ether_diffusion.method": method,
        "ether_diffusion.base": base.name,
        "ether_diffusion.base_digest": base_digest(base.denoiser),
        **origin,
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def _copy_encoder(run: SavedRun, output: Path) -> tuple[Path, ...]:
    """A controllable run's condition encoder, as it is."""
    target = _encoder_target(run, output)
    if run.condition_encoder is None or target is None:
        return ()
    with whole_folder(target) as partial:
        shutil.copytree(run.condition_encoder, partial, dirs_exist_ok=True)
    return (target,)


def _encoder_target(run: SavedRun, output: Path) -> Path | None:
    """Where a controllable run's condition encoder goes: next to a file, or into a folder."""
    if run.condition_encoder is None:
        return None
    name = run.condition_encoder.name
    return output.with_name(f"{output.stem}_{name}") if output.suffix == _SUFFIX else output / name


def _new(output: Path) -> AbstractContextManager[Path]:
    return whole_file(output) if output.suffix == _SUFFIX else whole_folder(output)
