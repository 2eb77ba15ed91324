"""How far two subjects' adapters bleed into one another when they act together, on the miniature.

    python benchmarks/several_subjects.py [--subjects smiling_mug party_cat] [--output runs/several_subjects]
        [--steps 800] [--images 4]

Trains an adapter for each subject, as the quickstart does, with a word of its own. Then generates the same prompts,
from the same noise, with the base, each adapter alone, both added up (`generate --adapter A --adapter B`), and one on
top of the other in both orders (`set_adapters`). Prompts name the first subject, the second, both, or neither (a thing
of a third class). Likeness to a subject is CLIP-I: the mean cosine similarity of the miniature's CLIP image features to
those of its five photos (to the miniature's backbone, photos of the cat are not alike). Intervals are Student's t over
prompts, 95%; differences are paired by prompt. What is complete is kept on a rerun.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

WORDS = ("qwe", "zxc")
GROUPS = ("first", "second", "both", "neither")


@dataclass(frozen=True)
class Trained:
    """A subject of the miniature, and the run of its adapter."""

    name: str
    word: str
    run: Path

    @property
    def noun(self) -> str:
        from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS

        return f"{self.word} {SUBJECTS[self.name].class_name}"

    @property
    def prompts(self) -> list[str]:
        from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS

        return [template.format(subject=self.noun) for template in SUBJECTS[self.name].templates]

    @cached_property
    def features(self) -> Any:
        """(5, 128) of its photos."""
        from ether_diffusion.tinyworld.builtin_subjects import render_photos
        from ether_diffusion.tinyworld.scoring import load_scorers

        return load_scorers().image_features(render_photos(self.name))


def main() -> None:
    """Train, generate, and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs=2, default=["smiling_mug", "party_cat"], metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("runs/several_subjects"))
    parser.add_argument("--steps", type=int, default=800, help="training steps of each adapter")
    parser.add_argument("--images", type=int, default=4, help="images of each prompt")
    arguments = parser.parse_args()
    subjects = [train(name, word, arguments) for name, word in zip(arguments.subjects, WORDS, strict=True)]
    images = generate_all(subjects, arguments)
    scores = {key: likeness(files, subjects, arguments.images) for key, files in images.items()}
    print(means(scores, subjects))
    print()
    print(bleeding(scores, subjects))
    print(f"\n{stacking(subjects)}\n{sheet(images, arguments)}")


def train(name: str, word: str, arguments: argparse.Namespace) -> Trained:
    """The quickstart on this subject, with this word for it."""
    from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS
    from ether_diffusion_cli import main as run_command

    run = arguments.output / f"{name}-{arguments.steps}"
    settings = [
        f"output_dir={run}",
        f"data.instance_dir=builtin:{name}",
        f"data.class_name={SUBJECTS[name].class_name}",
    ]
    settings += [f"data.identifier={word}", f"training.steps={arguments.steps}", "training.resume=true"]
    settings += ["validation.prompts=[]", "training.tracker=none"]
    if run_command(["train", "dreambooth", "--config", "quickstart/dreambooth", *settings]):
        raise SystemExit(f"{name}: training failed.")
    return Trained(name, word, run)


def prompts_of(subjects: Sequence[Trained]) -> dict[str, list[str]]:
    """By group."""
    from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, evaluation_templates
    from ether_diffusion.tinyworld.phrasing import WHERE
    from ether_diffusion.tinyworld.scenes import CLASSES

    first, second = subjects
    classes = [SUBJECTS[one.name].class_name for one in subjects]
    other = next(kind for kind in ("dog", *CLASSES) if kind not in classes)
    plain = evaluation_templates(("a red ball", "a blue star", "a yellow mushroom", "a pink flower"))
    return {
        "first": first.prompts,
        "second": second.prompts,
        "both": [f"a {first.noun} and a {second.noun} {words[0]}" for words in WHERE.values()],
        "neither": [template.format(subject=other) for template in plain],
    }


def generate_all(subjects: Sequence[Trained], arguments: argparse.Namespace) -> dict[tuple[str, str], list[Path]]:
    """The images by how the adapters act, and by what the prompts name."""
    from ether_diffusion.evaluation.quick_look import SAMPLING
    from ether_diffusion.generation import generate

    files = {}
    for way in WAYS:
        pipeline, record = load(way, subjects)
        for group, prompts in prompts_of(subjects).items():
            folder = arguments.output / "-".join([*arguments.subjects, str(arguments.steps)]) / way / group
            options: dict[str, Any] = {"images_per_prompt": arguments.images, "sampling": SAMPLING, "batch_size": 10}
            files[way, group] = generate(pipeline, prompts, folder, **options, record=record).files
    return files


STACKS = ("first, then second", "second, then first")
WAYS = ("base", "first", "second", "sum", *STACKS)


def load(way: str, subjects: Sequence[Trained]) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and what its images record."""
    from ether_diffusion import load_adapter
    from ether_diffusion.generation import load_pipeline, read_run

    runs = {"first": subjects[0].run, "second": subjects[1].run}
    record: dict[str, Any] = {"way": way, "adapters": [read_run(run).trained.digest for run in runs.values()]}
    options: dict[str, Any] = {"base_model": "tiny", "device": "cpu"}
    if way == "sum":
        return load_pipeline([(run, 1.0) for run in runs.values()], **options)[0], record
    if way in ("base", "first", "second"):
        return load_pipeline(runs.get(way), **options)[0], record
    pipeline: Any = load_pipeline(None, **options)[0]
    for name, run in runs.items():
        load_adapter(pipeline.unet, run, name)
    pipeline.unet.set_adapters(way.split(", then "))
    return pipeline, record


def likeness(files: Sequence[Path], subjects: Sequence[Trained], images: int) -> list[list[float]]:
    """To each subject, prompt by prompt: mean cosine similarity to its photos."""
    from PIL import Image

    from ether_diffusion.tinyworld.scoring import load_scorers

    found = load_scorers().image_features([Image.open(file).convert("RGB") for file in files])
    return [(found @ one.features.T).mean(dim=1).view(-1, images).mean(dim=1).tolist() for one in subjects]


Scores = Mapping[tuple[str, str], list[list[float]]]


def means(scores: Scores, subjects: Sequence[Trained]) -> str:
    """Likeness to the first and the second subject for every way and group."""
    lines = [f"| prompts name | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for group in GROUPS:
        cells = (" / ".join(shown(one) for one in scores[way, group]) for way in WAYS)
        lines.append(f"| {group} | {' | '.join(cells)} |")
    photos = [(one.features @ one.features.T).triu(1) for one in subjects]
    real = [float(pairs[pairs != 0].mean()) for pairs in photos]
    across = float((subjects[0].features @ subjects[1].features.T).mean())
    note = f"{real[0]:.3f} and {real[1]:.3f}, of one subject's to the other's {across:.3f}"
    return "\n".join([*lines, "", f"Likeness of the photos of a subject to one another: {note}."])


def shown(values: Sequence[float], sign: str = "") -> str:
    from ether_diffusion.evaluation.intervals import t_interval

    found = t_interval(values)
    return f"{found.value:{sign}.3f} ± {(found.high - found.low) / 2:.3f}"


def bleeding(scores: Scores, subjects: Sequence[Trained]) -> str:
    """What the other adapter does to the images of prompts that name one subject: differences, prompt by prompt."""
    lines = ["| with the other adapter | prompts name | likeness to it | to the other |", "|---|---|---|---|"]
    for way in WAYS[3:]:
        for place, one in enumerate(subjects):
            group = GROUPS[place]
            before, after = scores[group, group], scores[way, group]
            changes = [[b - a for a, b in zip(before[k], after[k], strict=True)] for k in (place, 1 - place)]
            lines.append(f"| {way} | {one.name} | {' | '.join(shown(change, '+') for change in changes)} |")
    return "\n".join(lines)


def stacking(subjects: Sequence[Trained]) -> str:
    """How far stacked adapters' weights are from the sum, relative to the change of the sum."""
    from ether_diffusion.adapters.attach import merge

    weights = {}
    for way in ("base", "sum", *STACKS):
        unet = load(way, subjects)[0].unet
        if way in STACKS:
            merge(unet)
        weights[way] = {key: value.double() for key, value in unet.state_dict().items()}

    def distance(left: str, right: str) -> float:
        return sum(float((weights[left][key] - weights[right][key]).norm()) ** 2 for key in weights["base"]) ** 0.5

    size = distance("sum", "base")
    sums, orders = (distance(STACKS[0], other) / size for other in ("sum", STACKS[1]))
    return f"Stacked: {sums:.2f} of the sum's change away from the sum; one order from the other: {orders:.2f}."


def sheet(images: Mapping[tuple[str, str], list[Path]], arguments: argparse.Namespace) -> Path:
    """A contact sheet: the first image of eight prompts of each group, way by way."""
    from ether_diffusion.pictures import save_sheets

    rows = [(f"{group}: {way}", images[way, group][:: arguments.images][:8]) for group in GROUPS for way in WAYS]
    return save_sheets(rows, arguments.output / f"{'-'.join(arguments.subjects)}.png", 96, own=True)[0]


if __name__ == "__main__":
    main()
