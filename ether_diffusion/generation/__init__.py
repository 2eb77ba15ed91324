"""Images from prompts and a saved adapter: assembles a pipeline, draws, and keeps what is complete."""

from .drawing import Job, draw, fault, jobs_for
from .folders import generate, grid, read_prompts
from .loading import load_pipeline, pick_device, pick_dtype
from .runs import SavedRun, read_run, run_config_of
from .sampling import SCHEDULERS, ControllableSampling, Sampling, make_scheduler

__all__ = [
    "SCHEDULERS",
    "ControllableSampling",
    "Job",
    "Sampling",
    "SavedRun",
    "draw",
    "fault",
    "generate",
    "grid",
    "jobs_for",
    "load_pipeline",
    "make_scheduler",
    "pick_device",
    "pick_dtype",
    "read_prompts",
    "read_run",
    "run_config_of",
]
