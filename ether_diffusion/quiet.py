"""Keeps notices of dependencies' imports off the terminal, and in our commands their warnings and bars, too."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

NOISY_IMPORTS = ("bitsandbytes", "diffusers.quantizers.torchao", "torch.utils._pytree", "torchao")
"""PEFT imports these where they are installed, and their loggers speak while they load."""


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence the notices of imports in the block, as `quiet_dependencies`; afterwards the loggers are as they were."""
    loggers = [logging.getLogger(name) for name in NOISY_IMPORTS if os.environ.get("ETHER_DIFFUSION_VERBOSE") != "1"]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def quiet_dependencies() -> None:
    """Silence messages that a user of the commands cannot act on. ETHER_DIFFUSION_VERBOSE=1 shows them all."""
    if os.environ.get("ETHER_DIFFUSION_VERBOSE") == "1":
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorBoard imports TensorFlow if it is installed
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    for name in (*NOISY_IMPORTS, "torch.utils.cpp_extension", "torch.distributed", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)

    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
