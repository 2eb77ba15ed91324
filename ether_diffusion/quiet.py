"""Keeps dependencies' warnings and progress bars off the terminal of our commands. Importing the library does not."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_dependencies() -> None:
    """Silence messages that a user of the commands cannot act on. ETHER_DIFFUSION_VERBOSE=1 shows them all."""
    if os.environ.get("ETHER_DIFFUSION_VERBOSE") == "1":
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorBoard imports TensorFlow if it is installed
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    for name in ("torch.utils.cpp_extension", "torch.distributed", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)

    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
