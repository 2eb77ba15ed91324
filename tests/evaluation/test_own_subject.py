"""One's own subject: the protocol that is made for it, its prompts, and a run's scores against the user's photos."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.comparison import choose
from ether_diffusion.evaluation.own_subject import NOTE, own_subject
from ether_diffusion.evaluation.protocols import SubjectProtocol, load_protocol
from ether_diffusion.evaluation.results import MetricRecord, Results
from ether_diffusion.generation import SavedRun
from ether_diffusion.pictures import save_png
from ether_diffusion.tinyworld.builtin_subjects import render_photos
from ether_diffusion_cli import main


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "my_dog"
    for k, photo in enumerate(render_photos("spotted_dog")[:3]):
        save_png(photo, folder / f"{k}.png")
    return folder


def saved(base_model: str, **data: object) -> SavedRun:
    return SavedRun(Path("runs/mine"), None, None, {"base_model": base_model, "data": data})


@pytest.mark.parametrize(
    ("class_name", "prompts", "kind"),
    [
        ("dog", None, "live"),
        ("golden retriever dog", None, "live"),
        ("backpack", None, "object"),
        ("retriever", "live", "live"),
        ("hot dog", "object", "object"),
    ],
)
def test_the_kind_of_prompts_follows_the_class_or_the_option(
    photos: Path, class_name: str, prompts: str | None, kind: str
) -> None:
    source = load_protocol(SubjectProtocol, "dreambooth/subject-macro-v2")
    run = saved("some/base", class_name=class_name, identifier="sks", resolution=768)
    own = own_subject(run, str(photos), prompts=prompts)
    assert own.protocol.templates("my_dog") == source.prompts[kind]
    assert own.protocol.resolution == 768
    assert own.protocol.prompt("my_dog", source.prompts[kind][0]) == f"a sks {class_name} in the jungle"
    assert {"DINO", "DINOv2", "CLIP-I", "CLIP-T", "LPIPS diversity", "drift"} <= set(own.protocol.metrics)
    assert not own.protocol.has("retrieval", "rank")


def test_prompts_of_a_file_take_the_place_of_the_protocols(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\na {subject} in my garden\n")
    own = own_subject(saved("some/base", class_name="dog"), str(photos), prompts=str(file))
    assert own.protocol.templates("my_dog") == ("a {subject} in my garden",)
    file.write_text("a dog in my garden\n")
    with pytest.raises(UserError, match=r"'a dog in my garden'; expected \{subject\} in it once"):
        own_subject(saved("some/base", class_name="dog"), str(photos), prompts=str(file))


def test_the_class_is_the_runs_or_given(photos: Path) -> None:
    with pytest.raises(UserError, match="give --class"):
        own_subject(saved("some/base"), str(photos))
    assert own_subject(saved("some/base"), str(photos), "cat").protocol.subjects["my_dog"].class_name == "cat"
    with pytest.raises(UserError, match="no photos"):
        own_subject(saved("some/base", class_name="dog"), str(photos.parent))


def results(subject: float, prompt: float) -> Results:
    record = {"low": 0.0, "high": 1.0, "higher_is_better": True}
    metrics = {
        "backbone": MetricRecord(value=subject, **record),
        "CLIP-T": MetricRecord(value=prompt, **record),
    }
    counts: dict[str, int] = dict.fromkeys(("subjects", "images", "missing", "black", "duplicate"), 0)
    return Results(protocol="a", protocol_digest="b", judges={}, versions={}, run={}, counts=counts, metrics=metrics)


def test_the_best_checkpoint_is_near_the_best_in_both_scores() -> None:
    protocol = load_protocol(SubjectProtocol, "tinyworld/dreambooth-v1")
    found = {"200": results(0.2, 0.5), "400": results(0.55, 0.45), "600": results(0.6, 0.1), "800": results(0.5, 0.4)}
    choice = choose(protocol, found)
    assert choice.best == "400"
    assert set(choice.pareto) == {"200", "400", "600"}
    assert "Best: 400, by the largest harmonic mean of backbone and CLIP-T" in choice.table()
    assert choose(protocol, {"a": results(-0.1, 0.3), "b": results(0.0, 0.2)}).best in ("a", "b")


@pytest.mark.slow
def test_a_run_is_scored_against_the_users_photos(
    finished_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {subject} in the snow\n")
    arguments = [
        "--photos",
        str(photos),
        "--class",
        "dog",
        "--prompts",
        str(prompts),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["score", str(finished_run), *arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"1 prompts (own). {NOTE}" in printed
    found = Results.read(tmp_path / "out")
    assert set(found.metrics) == {"backbone", "CLIP-I", "CLIP-T", "drift"}
    assert set(found.ceilings) == {"backbone", "CLIP-I"}
    assert list(found.data) == ["photos of my_dog"]
    assert found.counts["images"] == 2
    assert found.metrics["drift"].value > 0
    assert len(found.metrics["drift"].per_prompt) == 10
    rows = [json.loads(line) for line in (tmp_path / "out/images/my_dog/images.jsonl").read_text().splitlines()]
    assert all(re.fullmatch(r"a \w+ dog in the snow", row["prompt"]) for row in rows)
