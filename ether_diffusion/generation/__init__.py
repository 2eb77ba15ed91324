"""Images from prompts, conditions and a saved run: assembles a pipeline, draws, and keeps what is complete."""

from .conditioned import ConditionedJob, sample_conditioned
from .conditioned_folders import conditioned_sheet, generate_conditioned
from .folders import generate, grid, read_prompts
from .pipelines import load_pipeline, pick_device, pick_dtype
from .prompted import Job, fault, jobs_for, sample_images
from .sampling import SCHEDULERS, ControllableSampling, Sampling, make_scheduler
from .saved_run import SavedRun, read_run, run_config_of
from .sources import Source, file_sources, find_conditions, fitting_size, pair_sources, read_conditions

__all__ = [
    "SCHEDULERS",
    "ConditionedJob",
    "ControllableSampling",
    "Job",
    "Sampling",
    "SavedRun",
    "Source",
    "conditioned_sheet",
    "fault",
    "file_sources",
    "find_conditions",
    "fitting_size",
    "generate",
    "generate_conditioned",
    "grid",
    "jobs_for",
    "load_pipeline",
    "make_scheduler",
    "pair_sources",
    "pick_device",
    "pick_dtype",
    "read_conditions",
    "read_prompts",
    "read_run",
    "run_config_of",
    "sample_conditioned",
    "sample_images",
]
