"""`training.compile`: the blocks that a model repeats, compiled one by one and in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ether_diffusion.errors import TrainingFailed, first_line


def compile_repeated_blocks(module: nn.Module) -> int:
    """Compile every block of the classes that diffusers' models name as repeated. Returns how many there are.

    Equal blocks share their code, so that this takes a fraction of the time that a whole model does. The names of
    parameters stay as they are.
    """
    classes = {name for part in module.modules() for name in getattr(part, "_repeated_blocks", None) or ()}
    blocks = [part for part in module.modules() if type(part).__name__ in classes]
    for block in blocks:
        block.compile()
    return len(blocks)


@contextlib.contextmanager
def compile_errors(compiles: bool) -> Iterator[None]:
    """Within the block, what torch cannot compile is one line. Raises TrainingFailed."""
    if not compiles:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    try:
        yield
    except TorchDynamoException as error:
        reason = first_line(getattr(error, "inner_exception", error))  # a backend's own, in torch's words around it
        raise TrainingFailed(f"training.compile: torch cannot compile here ({reason}). Set it to false.") from error


def uncompiled(compiles: bool) -> contextlib.AbstractContextManager[object]:
    """Within the block compiled modules run as they are: other batch shapes would be compiled for a few calls."""
    return torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()
