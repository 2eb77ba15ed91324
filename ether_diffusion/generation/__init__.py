"""Images from prompts, conditions and a saved run: assembles a pipeline, samples, and keeps what is complete."""

from .folders import GeneratedImages, conditioned_rows, generate, generate_conditioned, read_prompts
from .jobs import Job, fault, jobs_for, sample_images
from .pipelines import load_pipeline, pick_device, pick_dtype
from .requests_file import Request, generate_requests, read_requests
from .sampling import ControllableSampling, Sampling
from .saved_run import SavedRun, checkpoints_of, read_run
from .sources import Source, file_sources, find_conditions, fitting_size, pair_sources, read_conditions
from .summed_runs import SummedRuns, read_sum

__all__ = [
    "ControllableSampling",
    "GeneratedImages",
    "Job",
    "Request",
    "Sampling",
    "SavedRun",
    "Source",
    "SummedRuns",
    "checkpoints_of",
    "conditioned_rows",
    "fault",
    "file_sources",
    "find_conditions",
    "fitting_size",
    "generate",
    "generate_conditioned",
    "generate_requests",
    "jobs_for",
    "load_pipeline",
    "pair_sources",
    "pick_device",
    "pick_dtype",
    "read_conditions",
    "read_prompts",
    "read_requests",
    "read_run",
    "read_sum",
    "sample_images",
]
