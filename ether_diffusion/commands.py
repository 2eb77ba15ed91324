"""The subcommands of `ether-diffusion`."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from .quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from PIL import Image  # noqa: E402

from .adapters.attach import find_adapter  # noqa: E402
from .adapters.storage import SavedAdapter, read_adapter  # noqa: E402
from .config import load_config, to_yaml  # noqa: E402
from .data.photos import find_photos  # noqa: E402
from .errors import UserError  # noqa: E402
from .evaluation.run import evaluate  # noqa: E402
from .generation import Sampling, generate, load_pipeline, read_prompts, run_config_of  # noqa: E402
from .pictures import read_settings, save_png, sheet  # noqa: E402
from .training import dreambooth  # noqa: E402
from .training.environment import Interrupted  # noqa: E402
from .training.familiar import answers  # noqa: E402
from .training.loop import TrainingFailed  # noqa: E402


def run(arguments: Namespace) -> int:
    """Run a parsed command and turn what goes wrong into one line and an exit code."""
    command = {"train": _train, "generate": _generate, "evaluate": _evaluate, "inspect": _inspect}[arguments.command]
    try:
        command(arguments)
    except UserError as error:
        return _fail(str(error), 2)
    except TrainingFailed as error:
        return _fail(str(error), 1)
    except Interrupted as error:
        return _fail(str(error), 128 + error.signum)
    except KeyboardInterrupt:
        return _fail("Stopped.", 130)
    return 0


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"ether-diffusion: {line}", file=sys.stderr)
    return code


def _train(arguments: Namespace) -> None:
    config = load_config(dreambooth.DreamBoothConfig, arguments.config, arguments.overrides, renamed=answers())
    if arguments.print_config:
        print(to_yaml(dreambooth.resolve(config)), end="")
        return
    dreambooth.run(config, dry_run=arguments.dry_run)


def _generate(arguments: Namespace) -> None:
    if arguments.adapter is None and arguments.base_model is None:
        raise UserError("generate: give --adapter RUN, or --base-model NAME to draw from a base alone.")
    prompts = [arguments.prompt] if arguments.prompt is not None else read_prompts(arguments.prompts)
    sampling = Sampling(
        scheduler=arguments.scheduler,
        steps=arguments.steps,
        guidance=arguments.guidance,
        negative_prompt=arguments.negative_prompt,
    )
    output = Path(arguments.output)
    after = _draw(arguments, arguments.adapter, prompts, sampling, output)
    _tell_faults(after)
    print(f"{len(after)} images, grid.png and images.jsonl in {output}")
    if arguments.compare and arguments.adapter is not None:
        before = _draw(arguments, None, prompts, sampling, output / "before")
        rows = [("before: the base alone", before), ("after: with the adapter", after)]
        page = sheet([*_photo_row(arguments.adapter), *((title, _open(files)) for title, files in rows)])
        print(f"Contact sheet: {save_png(page, output / 'contact_sheet.png')}")


def _tell_faults(files: list[Path]) -> None:
    faults = [(read_settings(file) or {}).get("fault") for file in files]
    if any(faults):
        counts = f"{faults.count('nan')} NaN and {faults.count('black')} black"
        print(
            f"ether-diffusion: of {len(files)} images {counts}; images.jsonl says which. Try --dtype fp32.",
            file=sys.stderr,
        )


def _draw(
    arguments: Namespace, adapter: str | None, prompts: list[str], sampling: Sampling, output: Path
) -> list[Path]:
    trained = read_adapter(arguments.adapter) if arguments.adapter else None
    base_model = arguments.base_model or (trained.base_model if trained else None)
    vae = arguments.vae or (trained.vae if trained else None)
    pipeline, saved = load_pipeline(
        adapter,
        base_model=base_model,
        revision=trained.revision if trained and base_model == trained.base_model else None,
        vae=vae,
        allow_pickle=arguments.allow_pickle,
        scale=arguments.scale,
        merged=arguments.merge,
        device=arguments.device,
        dtype=arguments.dtype,
        resolution=arguments.resolution,
        quantization=arguments.quantization,
        offload=arguments.offload,
    )
    return generate(
        pipeline,
        prompts,
        output,
        images_per_prompt=arguments.num_images,
        seed=arguments.seed,
        sampling=sampling,
        resolution=arguments.resolution,
        batch_size=arguments.batch_size,
        record=_record(arguments, base_model, vae, saved),
    )


def _record(
    arguments: Namespace, base_model: str | None, vae: str | None, saved: SavedAdapter | None
) -> dict[str, object]:
    """What an image's file says of the models behind it."""
    facts: dict[str, object] = {"base_model": base_model, "dtype": arguments.dtype}
    if arguments.quantization is not None:
        facts["quantization"] = arguments.quantization
    if vae is not None:
        facts["vae"] = vae
    if saved is not None:
        facts |= {"adapter": saved.digest, "scale": arguments.scale, "merged": arguments.merge}
    return facts


def _photo_row(adapter: str) -> list[tuple[str, list[Image.Image]]]:
    """The photos that the adapter was trained on, where its run folder still names them."""
    data = (run_config_of(find_adapter(adapter)) or {}).get("data", {})
    if not data.get("instance_dir"):
        return []
    try:
        photos = find_photos(data["instance_dir"])
    except UserError:
        return []
    title = f'the photos: {photos.folder}, "{data.get("instance_prompt")}"'
    return [(title, [photo.open() for photo in photos.photos])]


def _open(files: list[Path]) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in files]


def _evaluate(arguments: Namespace) -> None:
    output = arguments.output or find_adapter(arguments.adapter).parent / "evaluation"
    result = evaluate(arguments.adapter, output, images_per_prompt=arguments.num_images, seed=arguments.seed)
    print(result.table())
    print(f"Contact sheet: {result.contact_sheet}")


def _inspect(arguments: Namespace) -> None:
    saved = read_adapter(arguments.adapter)
    rows = {
        "folder": saved.folder,
        "method": saved.method,
        "base model": saved.base_model,
        "parameters": f"{saved.parameters:,} in {len(saved.tensors)} tensors",
        "sha256": saved.digest,
    }
    hidden = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "task_type"}
    for key, value in sorted(saved.config.to_dict().items()):
        if key not in hidden and value not in (None, {}, [], ""):
            rows[key] = ", ".join(sorted(value)) if isinstance(value, (set, list, tuple)) else value
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
