"""The Ray executor: units over the GPUs or cores of a machine or a cluster; those of lost workers are done again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ether_diffusion.errors import TrainingFailed, UserError

from .config import BenchmarkConfig, Unit
from .executors import Executor, UnitJob

RETRIES = 3
OBJECT_STORE = 100 * 2**20
"""Bytes. Workers exchange files, not objects."""


@dataclass(frozen=True)
class RayExecutor(Executor):
    """Workers of Ray, each with a GPU, or else with cores for its threads.

    Raises UserError also if Ray is not installed or cannot be reached, and for a unit that lost too many workers.
    """

    address: str | None = None
    """Of a running cluster, as for `ray.init`; `auto`: the one of this machine; None: RAY_ADDRESS, or this machine
    alone. All machines need this package, and the benchmark's folders under the same paths."""
    workers: int | None = None
    """Most workers at the same time; None: as many as there are GPUs, or else cores for their threads."""
    retries: int = RETRIES
    """How often a unit is given to another worker after one was lost: killed, out of memory, or gone with its machine.
    A lost worker's checkpoints and images are kept."""

    def run(self, config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
        ray = _import_ray()
        started = not ray.is_initialized()
        if started:
            self._start(ray, config)
        try:
            return self._distribute(ray, config, units)
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

    def _distribute(self, ray: Any, config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
        gpus = ray.cluster_resources().get("GPU", 0) if config.device in (None, "cuda") else 0
        remote = ray.remote(do_unit).options(
            num_cpus=1 if gpus else _threads(config),
            num_gpus=1 if gpus else 0,
            max_retries=0,
            # The same everywhere: by default Ray gives each worker as many threads as it asks for cores.
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(_threads(config))}},
        )
        at_once, config_json, folder = self.workers or len(units), config.model_dump_json(), os.getcwd()  # noqa: PTH109
        waiting, tries, failed, running = list(reversed(units)), dict.fromkeys(units, 0), {}, {}
        done = 0
        while waiting or running:
            while waiting and len(running) < at_once:
                unit = waiting.pop()
                running[remote.remote(UnitJob(config_json, unit), folder)] = unit
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
            print(f"[{done}/{len(units)}] {unit}: {fault or 'done'}", flush=True)
        return failed


def do_unit(job: UnitJob, folder: str) -> str | None:
    """In a Ray worker: do a unit. Returns why its training failed, if it did.

    Args:
        folder: Where relative paths start.
    """
    from ether_diffusion.quiet import quiet_dependencies

    quiet_dependencies()
    if os.path.isdir(folder):  # noqa: PTH112
        os.chdir(folder)
    try:
        job.do()
    except TrainingFailed as error:
        return str(error)
    return None


def _threads(config: BenchmarkConfig) -> int:
    """Of each worker on a CPU: as many as a run without Ray takes here."""
    import torch

    return config.threads or torch.get_num_threads()


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UserError("--executor ray: Ray is not installed: pip install ray.") from None
    return ray
