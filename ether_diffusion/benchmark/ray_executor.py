"""The Ray executor: units over the GPUs or cores of a machine or a cluster."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ether_diffusion.errors import UserError
from ether_diffusion.generation.pipelines import check_device_name

from .config import BenchmarkConfig, Unit
from .executors import RETRIES, Executor, Job, Pool, PoolUnits, WorkerLost, fault_of
from .plan import Plan

OBJECT_STORE = 100 * 2**20
"""Bytes. Workers exchange files, not objects."""


@dataclass(frozen=True)
class RayExecutor(Executor):
    """Workers of Ray, each with a GPU, or else with cores for its threads.

    Raises UserError also if Ray is not installed or cannot be reached.
    """

    address: str | None = None
    """Of a running cluster, as for `ray.init`; `auto`: the one of this machine; None: RAY_ADDRESS, or this machine
    alone. All machines need this package, and the benchmark's folders under the same paths."""
    workers: int | None = None
    """Most workers at the same time; None: as many as there are GPUs, or else cores for their threads."""
    retries: int = RETRIES

    def check(self, plan: Plan) -> None:
        """Ray's own faults come first, before anything is trained. Its workers may have devices that are not here."""
        _import_ray()
        check_device_name(plan.config.device)

    def run(self, config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
        ray = _import_ray()
        started = not ray.is_initialized()
        if started:
            self._start(ray, config)
        pool = _RayWorkers(self.workers or len(units), retries=self.retries, ray=ray, remote=_remote(ray, config))
        try:
            return PoolUnits(pool).run(config, units)
        except BaseException:
            for job in pool.started:
                ray.cancel(job, force=True)
            raise
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


@dataclass
class _RayWorkers(Pool[Any]):
    ray: Any = None
    remote: Any = None
    started: list[Any] = field(default_factory=list)

    def start(self, job: Job) -> Any:
        self.started.append(self.remote.remote(job, str(Path.cwd())))
        return self.started[-1]

    def wait(self, running: Collection[Any]) -> Any:
        return self.ray.wait(list(running), num_returns=1)[0][0]

    def result(self, ended: Any) -> str | None:
        try:
            return self.ray.get(ended)
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        except self.ray.exceptions.RayError as error:
            raise WorkerLost(f"{type(error).__name__}: {error}") from None


def do_unit(job: Job, folder: str) -> str | None:
    """In a Ray worker: do a unit, as `fault_of`.

    Args:
        folder: Where relative paths start.
    """
    from ether_diffusion.quiet import quiet_dependencies

    quiet_dependencies()
    if Path(folder).is_dir():
        os.chdir(folder)
    return fault_of(job)


def _remote(ray: Any, config: BenchmarkConfig) -> Any:
    gpus = ray.cluster_resources().get("GPU", 0) if config.device in (None, "cuda") else 0
    return ray.remote(do_unit).options(
        num_cpus=1 if gpus else _threads(config),
        num_gpus=1 if gpus else 0,
        max_retries=0,
        # The same everywhere: by default Ray gives each worker as many threads as it asks for cores.
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(_threads(config))}},
    )


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
