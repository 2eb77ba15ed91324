"""Keeps dependencies' warnings and bars off the terminal of our commands. A library import leaves them as they are."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_dependencies() -> None:
    """Silence what a user of the commands cannot act on. ETHER_DIFFUSION_VERBOSE=1 leaves everything on."""
    if os.environ.get("ETHER_DIFFUSION_VERBOSE") == "1":
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow, where it is installed, beside TensorBoard
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    for name in ("torch.utils.cpp_extension", "torch.distributed", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)

    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
