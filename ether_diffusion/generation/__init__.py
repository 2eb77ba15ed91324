"""Images from prompts, conditions and a saved run: assembles a pipeline, samples, and keeps what is complete."""

from .folders import GeneratedImages, conditioned_sheet, generate, generate_conditioned, grid, read_prompts
from .jobs import ConditionedJob, Job, fault, jobs_for, sample_conditioned, sample_images
from .pipelines import dtype_name, load_pipeline, pick_device, pick_dtype
from .sampling import SCHEDULERS, ControllableSampling, Sampling, make_scheduler
from .saved_run import SavedRun, checkpoints_of, read_run, run_config_of
from .sources import Source, file_sources, find_conditions, fitting_size, pair_sources, read_conditions

__all__ = [
    "SCHEDULERS",
    "ConditionedJob",
    "ControllableSampling",
    "GeneratedImages",
    "Job",
    "Sampling",
    "SavedRun",
    "Source",
    "checkpoints_of",
    "conditioned_sheet",
    "dtype_name",
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
