"""The subcommands of `ether-diffusion`."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from .quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from .adapters.attach import find_adapter  # noqa: E402
from .adapters.storage import read_adapter  # noqa: E402
from .config import load_config, to_yaml  # noqa: E402
from .data_commands import run_data  # noqa: E402
from .errors import UserError  # noqa: E402
from .evaluation.run import evaluate  # noqa: E402
from .generate_command import run_generate  # noqa: E402
from .training import controllable, dreambooth  # noqa: E402
from .training.environment import Interrupted  # noqa: E402
from .training.familiar import answers  # noqa: E402
from .training.loop import TrainingFailed  # noqa: E402
from .training.task_config import TaskConfig  # noqa: E402


def run(arguments: Namespace) -> int:
    """Run a parsed command and turn what goes wrong into one line and an exit code."""
    command = {
        "train": _train,
        "generate": run_generate,
        "evaluate": _evaluate,
        "data": run_data,
        "inspect": _inspect,
    }[arguments.command]
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


TASKS: dict[str, tuple[type[TaskConfig], Any, Any]] = {
    dreambooth.TASK: (dreambooth.DreamBoothConfig, dreambooth.resolve, dreambooth.run),
    controllable.TASK: (controllable.ControllableConfig, controllable.resolve, controllable.run),
}


def _train(arguments: Namespace) -> None:
    model, resolve, run = TASKS[arguments.task]
    config = load_config(model, arguments.config, arguments.overrides, renamed=answers(arguments.task))
    if arguments.print_config:
        print(to_yaml(resolve(config)), end="")
        return
    run(config, dry_run=arguments.dry_run)


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
