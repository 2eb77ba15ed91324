"""How the processes of a run share its work: a copy of everything each, or the frozen base in shards (FSDP2, ZeRO-3).

The trained weights are few and stay whole in every process: adapters, averages, optimisers and checkpoints hold
ordinary tensors. Only the frozen base, which takes the memory, is sharded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from ether_diffusion.errors import UserError

# accelerate shards on GPUs only, torch and DeepSpeed on CPUs too: so we read the launcher's variables ourselves.
FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def check_launch_config() -> None:
    """Refuse, before anything is loaded, a kind of sharding that would be ignored or fail.

    Raises:
        UserError: names the entries of the launch config, and what to write instead.
    """
    faults: list[str] = []
    if _is_true(FSDP):
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            faults.append(f"fsdp_version is {version}; write 2")
        if _is_true("FSDP_CPU_RAM_EFFICIENT_LOADING"):  # transformers would load no weights but in the first process
            faults.append("fsdp_cpu_ram_efficient_loading is true, or left out; write false")
        if _is_true("FSDP_ACTIVATION_CHECKPOINTING"):
            faults.append("fsdp_activation_checkpointing is true; take training.gradient_checkpointing=true")
    if _is_true(DEEPSPEED):
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError("The launch config asks for DeepSpeed, which is not installed: pip install deepspeed")
        plugin = _deepspeed_plugin()
        if plugin.zero_stage != 3:  # lower stages shard gradients and optimiser states only, which are small
            faults.append(f"zero_stage is {plugin.zero_stage}; write 3, or take DDP")
        elif plugin.zero3_init_flag:  # transformers would shard text encoders while it loads them
            faults.append("zero3_init_flag is true, or left out; write false")
    if faults:
        raise UserError(f"accelerate's launch config: {'; '.join(faults)}. See docs/several_gpus.md.")


def share_out(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> Copies | Shards:
    """Place a module on the device, as the launch config asks. Its children are the models in it.

    Raises:
        UserError: as `check_launch_config`; fp16 with DeepSpeed.
    """
    check_launch_config()
    if dist.is_initialized() and _is_true(FSDP):
        return Shards(accelerator, module, optimizer, _fsdp2)
    if dist.is_initialized() and _is_true(DEEPSPEED):
        if accelerator.mixed_precision == "fp16":  # accelerate leaves the gradient scaler to DeepSpeed's own optimiser
            raise UserError("training.mixed_precision: fp16 is not supported with DeepSpeed; take bf16 or no.")
        return Shards(accelerator, module, optimizer, _zero3)
    return Copies(accelerator, module, optimizer)


class Copies:
    """The whole module in each process: accelerate's data parallelism, or a single process."""

    sample_together = False
    """Whether a forward pass of the base needs all processes: one alone would wait for ever."""

    def __init__(self, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator = accelerator
        if accelerator.device.type == "cuda":
            to_channels_last(module)
        self.module, self.optimizer = accelerator.prepare(module, optimizer)

    def gradients(self, batch: dict[str, Any], parts: int, last: bool) -> dict[str, Tensor]:
        """Add the gradient of one of `parts` batches; after the `last` one it is the mean over all processes' batches.

        Returns:
            The module's losses of this process's batch.
        """
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
            losses = self.module(batch)
            self.accelerator.backward(losses["loss"] / parts)
        return losses


def to_channels_last(module: nn.Module) -> None:
    """Arrange the frozen convolutions' weights as cuDNN's fastest kernels read them; no number changes.

    Trained ones stay as they are: they are saved, and optimisers and averages keep copies of them.
    """
    for parameter in module.parameters():
        if parameter.ndim == 4 and not parameter.requires_grad and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


class Shards:
    """The frozen weights of the module's models in shards, the trained ones whole in each process. As `Copies`."""

    sample_together = True

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        shard: Callable[[nn.Module, Accelerator], Callable[[nn.Parameter], int]],
    ) -> None:
        self.module, self.device, self.scaler = module, accelerator.device, accelerator.scaler
        self.precision = PRECISIONS.get(accelerator.mixed_precision)
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.to(self.device)
        frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        if any(type(parameter) is not nn.Parameter or not parameter.is_floating_point() for parameter in frozen):
            raise UserError("quantization: a quantised base cannot be sharded; take DDP, or no quantization.")
        if not frozen:
            raise UserError("adapter.method: full freezes nothing, so there is nothing to shard; take DDP.")
        whole, held = sum(parameter.numel() for parameter in frozen), 0
        # Each model is sharded by itself, so that a validation pipeline can call it without the module around it.
        for model in module.children():
            if all(parameter.requires_grad for parameter in model.parameters()):
                continue  # nothing of it is frozen, as in a condition encoder
            size = shard(model, accelerator)
            held += sum(size(parameter) for parameter in model.parameters() if not parameter.requires_grad)
        accelerator.print(
            f"Shards:  {held / 1e6:,.2f}M of {whole / 1e6:,.2f}M frozen parameters in each of "
            f"{accelerator.num_processes} processes"
        )
        self.optimizer = AcceleratedOptimizer(optimizer, scaler=self.scaler)

    def gradients(self, batch: dict[str, Any], parts: int, last: bool) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            losses = self.module(batch)
        loss = losses["loss"] / parts
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if last:
            average(parameter.grad for parameter in self.trained)
        return losses


@torch.no_grad()
def average(tensors: Iterable[Tensor | None]) -> None:
    """Replace tensors by their means over the processes, in one message. All of them have the same dtype."""
    present = [tensor for tensor in tensors if tensor is not None]
    flat = torch.cat([tensor.flatten() for tensor in present])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(present, flat.split([tensor.numel() for tensor in present]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _fsdp2(model: nn.Module, accelerator: Accelerator) -> Callable[[nn.Parameter], int]:
    """FSDP2, with a unit for each block in the model's `_no_split_modules`. Returns the local size of a parameter."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    plugin = FullyShardedDataParallelPlugin()  # reads the launcher's variables
    options: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "ignored_params": {parameter for parameter in model.parameters() if parameter.requires_grad},
    }
    units = set(getattr(model, "_no_split_modules", None) or ())
    for part in reversed(list(model.modules())[1:]):  # blocks before those that hold them
        if type(part).__name__ in units:
            fully_shard(part, **options)
    fully_shard(model, **options)
    return lambda parameter: parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


def _deepspeed_plugin() -> Any:
    from accelerate.utils import DeepSpeedPlugin

    return DeepSpeedPlugin()  # reads the launcher's variables and the file they may name


def _zero3(model: nn.Module, accelerator: Accelerator) -> Callable[[nn.Parameter], int]:
    """DeepSpeed's ZeRO-3 without its optimiser, for the frozen part of the model. Returns a parameter's local size."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    zero = _deepspeed_plugin().deepspeed_config["zero_optimization"]
    given = {key: value for key, value in zero.items() if value != "auto"}
    with _without_trained(model):
        engine, *_ = deepspeed.initialize(
            model=model, config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": given}
        )
    object.__setattr__(model, "_zero3_engine", engine)  # its hooks leave the model when it is collected

    def size(parameter: Any) -> int:
        return parameter.ds_numel if parameter.ds_persist else parameter.ds_tensor.numel()

    return size


@contextlib.contextmanager
def _without_trained(model: nn.Module) -> Iterator[None]:
    """Within the block the modules that own trained parameters are out of the model."""
    taken = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if any(parameter.requires_grad for parameter in child.parameters(recurse=False))
    ]
    children = {id(parent): dict(parent._modules) for parent, _, _ in taken}  # in the order of parameter names
    for parent, name, _ in taken:
        del parent._modules[name]
    try:
        yield
    finally:
        for parent, _, _ in taken:
            parent._modules.clear()
            parent._modules.update(children[id(parent)])
