"""Units spread over the GPUs or the cores of a machine or a cluster by Ray; those of lost workers are done again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from ether_diffusion.errors import TrainingFailed, UserError

from .config import BenchmarkConfig, Unit

RETRIES = 3
OBJECT_STORE = 100 * 2**20
"""Bytes. Workers pass files on, not objects."""


class RayExecutor:
    """An executor of `run_benchmark`.

    Args:
        address: Of a running cluster, as for `ray.init`; `auto`: the one that this machine is part of; None: this
            machine alone, unless RAY_ADDRESS says otherwise. All its machines must see the benchmark's folders under
            the same paths, and have this package installed.
        workers: How many work at once at most; None: as many as there are GPUs, or else cores for their threads.
        retries: How often a unit is given to another worker after one was lost: killed, out of memory, or on a machine
            that went away. A lost worker's checkpoints and images are kept.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, retries: int = RETRIES) -> None:
        self.address, self.workers, self.retries = address, workers, retries

    def __call__(self, config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
        """Do the units, and tell why trainings failed.

        Raises:
            UserError: Ray is not installed or cannot be reached; something in a unit is the user's to mend; a unit's
                workers were lost more than `retries` times.
        """
        ray = _import_ray()
        started = not ray.is_initialized()
        if started:
            self._start(ray, config)
        try:
            return self._spread(ray, config, list(units))
        finally:
            if started:
                ray.shutdown()

    def _start(self, ray: Any, config: BenchmarkConfig) -> None:
        options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
        address = self.address or os.environ.get("RAY_ADDRESS")
        if address:
            options = {"address": address}
        elif self.workers is not None:
            options["num_cpus"] = self.workers * _threads(config)
        try:
            ray.init(**options)
        except Exception as error:  # on a machine too busy to start in time Ray raises no class of its own
            raise UserError(f"--executor ray: {' '.join(str(error).split())}") from error

    def _spread(self, ray: Any, config: BenchmarkConfig, units: list[Unit]) -> dict[Unit, str]:
        gpus = ray.cluster_resources().get("GPU", 0) if config.device in (None, "cuda") else 0
        remote = ray.remote(do_unit).options(
            num_cpus=1 if gpus else _threads(config),
            num_gpus=1 if gpus else 0,
            max_retries=0,
            # The same everywhere: Ray itself would give each worker as many threads as it asks cores for.
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(_threads(config))}},
        )
        at_once = self.workers or len(units)
        waiting, tries, failed, running = units[::-1], dict.fromkeys(units, 0), {}, {}
        done, total, folder, told = 0, len(units), os.getcwd(), config.model_dump_json()  # noqa: PTH109
        while waiting or running:
            while waiting and len(running) < at_once:
                unit = waiting.pop()
                running[remote.remote(told, unit.task, unit.method, unit.subject, folder)] = unit
            ready, _ = ray.wait(list(running), num_returns=1)
            unit = running.pop(ready[0])
            try:
                fault = ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                for other in running:
                    ray.cancel(other, force=True)
                cause = error.cause
                raise (cause if isinstance(cause, UserError) else error) from None
            except ray.exceptions.RayError as error:
                tries[unit] += 1
                kind = type(error).__name__
                if tries[unit] > self.retries:
                    raise UserError(f"{unit}: lost {tries[unit]} workers, the last by {kind}: {error}") from None
                print(f"{unit}: its worker was lost ({kind}); try {tries[unit]} of {self.retries}", flush=True)
                waiting.append(unit)
                continue
            done += 1
            if fault is not None:
                failed[unit] = fault
            print(f"[{done}/{total}] {unit}: {fault or 'done'}", flush=True)
        return failed


def do_unit(told: str, task: str, method: str, subject: str | None, folder: str) -> str | None:
    """What a Ray worker does; why the training failed, if it did.

    Args:
        told: The benchmark's config, as JSON.
        folder: Where relative paths start.
    """
    from ether_diffusion.quiet import quiet_dependencies

    from .worker import Worker

    quiet_dependencies()
    if os.path.isdir(folder):  # noqa: PTH112
        os.chdir(folder)
    try:
        Worker(BenchmarkConfig.model_validate_json(told)).do(Unit(task, method, subject))
    except TrainingFailed as error:
        return str(error)
    return None


def _threads(config: BenchmarkConfig) -> int:
    """Of each worker on a CPU: as many as a run without Ray would take here."""
    return config.threads or torch.get_num_threads()


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UserError("--executor ray: Ray is not installed: pip install ray.") from None
    return ray
