"""The subcommands of `ether-diffusion`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ether_diffusion.quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from ether_diffusion.adapters.storage import SavedAdapter  # noqa: E402
from ether_diffusion.config import load_config, to_yaml  # noqa: E402
from ether_diffusion.data.condition_kind import read_condition_kind  # noqa: E402
from ether_diffusion.errors import UserError, exit_code  # noqa: E402
from ether_diffusion.evaluation.quick_look import IMAGES_PER_PROMPT, evaluate  # noqa: E402
from ether_diffusion.evaluation.quick_maps import evaluate_maps  # noqa: E402
from ether_diffusion.generation import read_run  # noqa: E402
from ether_diffusion.models.condition_encoder import condition_encoder_digest  # noqa: E402
from ether_diffusion.report.page import write_report  # noqa: E402
from ether_diffusion.training import controllable, dreambooth  # noqa: E402
from ether_diffusion.training.config import TaskConfig  # noqa: E402
from ether_diffusion.training.diffusers_flags import hints  # noqa: E402

from .benchmark import run_benchmark_command, run_grid_command  # noqa: E402
from .data import run_data  # noqa: E402
from .generate import run_generate  # noqa: E402


def run(arguments: Namespace) -> int:
    """Run a parsed command and turn what goes wrong into one line and an exit code."""
    command = {
        "train": _train,
        "generate": run_generate,
        "evaluate": _evaluate,
        "report": _report,
        "benchmark": run_benchmark_command,
        "grid": run_grid_command,
        "data": run_data,
        "inspect": _inspect,
    }[arguments.command]
    return exit_code("ether-diffusion", lambda: command(arguments))


TASKS: dict[str, tuple[type[TaskConfig], Any, Any]] = {
    dreambooth.TASK: (dreambooth.DreamBoothConfig, dreambooth.resolve, dreambooth.run),
    controllable.TASK: (controllable.ControllableConfig, controllable.resolve, controllable.run),
}


def _train(arguments: Namespace) -> None:
    model, resolve, run = TASKS[arguments.task]
    config = load_config(model, arguments.config, arguments.overrides, renamed=hints(arguments.task))
    if arguments.print_config:
        print(to_yaml(resolve(config)), end="")
        return
    run(config, dry_run=arguments.dry_run)


def _evaluate(arguments: Namespace) -> None:
    run = read_run(arguments.adapter)
    if run.condition_encoder is None:
        output = arguments.output or run.trained.folder.parent / "evaluation"
        number = arguments.num_images or IMAGES_PER_PROMPT
        result = evaluate(arguments.adapter, output, images_per_prompt=number, seed=arguments.seed)
    else:
        if arguments.num_images is not None:
            raise UserError(f"--num-images {arguments.num_images}: a controllable run draws one image a map.")
        output = arguments.output or run.condition_encoder.parent / "evaluation"
        result = evaluate_maps(run, output, seed=arguments.seed)
    print(result.table())
    print(f"Contact sheet: {result.contact_sheet}")


def _report(arguments: Namespace) -> None:
    for file in write_report(arguments.runs, arguments.output):
        print(file)


def _inspect(arguments: Namespace) -> None:
    run = read_run(arguments.adapter)
    rows: dict[str, Any] = {}
    if run.adapter is not None:
        saved = run.adapter
        tensors = f" in {len(saved.tensors)} tensors" if isinstance(saved, SavedAdapter) else ""
        rows |= {
            "folder": saved.folder,
            "method": saved.method,
            "base model": saved.base_model,
            "parameters": f"{saved.parameters:,}{tensors}",
            "sha256": saved.digest,
        }
    if isinstance(run.adapter, SavedAdapter):
        saved = run.adapter
        if saved.before is not None:
            rows |= {"before": f"{saved.before.folder}: {saved.before.method}, {saved.before.parameters:,} parameters"}
        hidden = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "task_type"}
        for key, value in sorted(saved.config.to_dict().items()):
            if key not in hidden and value not in (None, {}, [], ""):
                rows[key] = ", ".join(sorted(value)) if isinstance(value, (set, list, tuple)) else value
    if run.condition_encoder is not None:
        if run.adapter is None:
            rows["base model"] = run.base_model
        kind = read_condition_kind(run.condition_encoder)
        rows |= {
            "condition encoder": run.condition_encoder,
            "its conditions": f"{kind.kind}{f' of {len(kind.names)} classes' * bool(kind.names)}"
            if kind
            else "not told",
            "its sha256": condition_encoder_digest(run.condition_encoder),
        }
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
