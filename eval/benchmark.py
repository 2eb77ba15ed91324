"""A benchmark from end to end: for each method and subject train, draw and score; then a table over the methods.

python eval/benchmark.py --config configs/benchmark/tinyworld.yaml                    # one after another, resumable
python eval/benchmark.py --config configs/benchmark/dreambooth.yaml --executor ray    # over the GPUs of this machine
python eval/benchmark.py --config configs/benchmark/dreambooth.yaml --shard 3/30      # a share, as in a SLURM array
"""

from __future__ import annotations

import argparse
import re
import sys

from ether_diffusion.quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from ether_diffusion.config import load_config  # noqa: E402
from ether_diffusion.errors import UserError  # noqa: E402
from ether_diffusion.evaluation.benchmark import Outcome, progress, run_benchmark  # noqa: E402
from ether_diffusion.evaluation.benchmark_config import WHOLE, BenchmarkConfig, Shard  # noqa: E402
from ether_diffusion.evaluation.benchmark_ray import RETRIES, RayExecutor  # noqa: E402
from ether_diffusion.training.environment import Interrupted  # noqa: E402


def shard(text: str) -> Shard:
    """`3/30`: the third of thirty."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 1 to N, such as 3/30")
    return Shard(int(match[1]), int(match[2]))


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return int(text)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a YAML file, or a shipped config's name: benchmark/tinyworld")
    add("--shard", type=shard, default=WHOLE, metavar="I/N", help="do the I-th of N shares (default: everything)")
    add("--executor", choices=("local", "ray"), default="local", help="one after another here, or by Ray")
    add("--ray-address", metavar="ADDRESS", help="of a cluster; auto: this machine's (default: this machine alone)")
    add("--workers", type=positive, metavar="N", help="of Ray, at once (default: one a GPU, or one a core)")
    add("--retries", type=int, default=RETRIES, metavar="N", help=f"of a unit by lost workers (default: {RETRIES})")
    add("--status", action="store_true", help="tell how far everything is, and leave")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser.parse_intermixed_args()


def benchmark(arguments: argparse.Namespace) -> int:
    """Run what was asked for, and tell what came of it."""
    config = load_config(BenchmarkConfig, arguments.config, arguments.overrides)
    if arguments.status:
        print(progress(config))
        return 0
    executor = None
    if arguments.executor == "ray":
        executor = RayExecutor(arguments.ray_address, arguments.workers, arguments.retries)
    return tell(run_benchmark(config, arguments.shard, executor))


def tell(outcome: Outcome) -> int:
    """Print tables and what is left; exit code 1 if trainings failed."""
    for table in outcome.tables.values():
        print(f"\n{table}")
    for file in outcome.files:
        print(file)
    if outcome.waiting:
        print(f"Not done: {len(outcome.waiting)} units, the first of them {outcome.waiting[0]}. --status tells more.")
    for unit, reason in outcome.failed.items():
        print(f"eval/benchmark.py: {unit}: {reason}", file=sys.stderr)
    return 1 if outcome.failed else 0


def main() -> int:
    """Exit code 2 and one line for what is the user's to mend; 130 or 143 if interrupted."""
    try:
        return benchmark(parse())
    except UserError as error:
        for line in str(error).splitlines():
            print(f"eval/benchmark.py: {line}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"eval/benchmark.py: {str(error).split(', saved.')[0]}. The same command goes on.", file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:
        print("eval/benchmark.py: Stopped. The same command goes on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
