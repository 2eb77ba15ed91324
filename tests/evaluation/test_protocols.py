"""Protocols: the shipped ones state the paper's choices; digests cover all that is stated; names match as a whole."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.protocols import (
    FILES,
    MapProtocol,
    Protocol,
    SubjectProtocol,
    load_any_protocol,
    load_protocol,
)
from ether_diffusion.metrics import preprocessing
from ether_diffusion.metrics.segmenters import CSAIL_SCALES, CSAIL_SINGLE_SCALE
from ether_diffusion.tinyworld.builtin_subjects import IDENTIFIER, SUBJECTS
from ether_diffusion.tinyworld.render import LABELS

NAMES = sorted(file.relative_to(FILES).with_suffix("").as_posix() for file in FILES.glob("*/*.yaml"))

DIGESTS = {
    "dreambooth/oft-v1": "041c5e0586eea0b6a22dd704e01a48d090433b3072588dab2f2fac12912bb0bd",
    "dreambooth/subject-macro-v1": "384f9f78204df2965a423071a1af1d8ad730e0dbf05e20006057831ce4d34d49",
    "s2i/csail-single-scale-v1": "e3d6fd9752447ae096413987910f728881c736c074991a2e02912411e7ef6779",
    "s2i/csail-v1": "86a43735a7b96546f0ac27c5509f668c020ee60a01d7b211e54a42aa46acf66c",
    "tinyworld/dreambooth-v1": "d964f44cefc6362ecf74a6e02714ce38f046d6ec0f68aa11b6b02b739984b2ca",
    "tinyworld/rehearsal-s2i-v1": "6c82c67a024c27cba3c8dffffd41975a70306864b328a74f328a43b920972023",
    "tinyworld/rehearsal-v1": "e170cd50dc8a32b281cbf97b34b17bd14ba98165237215d4886457940f79594c",
    "tinyworld/s2i-v1": "d003375ec5d607c88c9be4d7bf2cca77d65ffa1e30c9ae58e1c1005d906aef3d",
    "dreambooth/subject-macro-v2": "01017870a2fa37e36db9af3f12bc616c6204ceae2fd318393a65b4dc27f11801",
    "tinyworld/dreambooth-v2": "adc0682f5e747f27d0d61c2faeb6c50e01c168aa8f2fdc43088a1c600bbd4643",
    "tinyworld/s2i-v2": "5376b7b79e1eadf17274e0e5be7e45ab6400fe461172f1bf1a787130170c9863",
    "s2i/csail-single-scale-v2": "a019c2f1a3e4889963c38829fed2cf05854f58a48510287e20d5c62af45056b5",
    "s2i/csail-v2": "216eee49f42f3b344545a56cf99828b69c6a09ec63478ae6b6255343dd62a5be",
}


def load(name: str) -> Protocol:
    return load_protocol(MapProtocol if "s2i" in name else SubjectProtocol, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_protocol_is_named_as_its_file_and_opens_with_its_command(name: str) -> None:
    assert load(name).name == name
    text = (FILES / f"{name}.yaml").read_text()
    assert "#   ether-diffusion score " in text
    assert f"--protocol {name}" in text


def test_digests_of_shipped_protocols_are_those_of_published_results() -> None:
    assert {name: load(name).digest for name in NAMES} == DIGESTS
    assert len(set(DIGESTS.values())) == len(NAMES)


def test_the_dreambooth_protocols_are_the_papers() -> None:
    as_published = load_protocol(SubjectProtocol, "dreambooth/oft-v1")
    default = load_protocol(SubjectProtocol, "dreambooth/subject-macro-v1")
    for protocol in (as_published, default):
        images = sum(len(protocol.templates(subject)) for subject in protocol.subjects) * protocol.images_per_prompt
        assert (len(protocol.subjects), images) == (30, 3000)
        live = {entry.class_name for entry in protocol.subjects.values() if entry.prompts == "live"}
        assert live == {"cat", "dog"}
        assert (protocol.sampling.scheduler, protocol.sampling.steps, protocol.sampling.guidance) == ("dpm++", 25, 7.5)
        assert protocol.sampling.negative_prompt == ""
        assert list(protocol.metrics)[:4] == ["DINO", "CLIP-I", "CLIP-T", "LPIPS"]
        scorers: dict[str, Any] = dict(protocol.judges)
        assert (scorers["lpips"].net, scorers["lpips"].preprocessing) == ("alex", preprocessing.LPIPS_SQUASH)
        assert scorers["clip-l14"].preprocessing == preprocessing.CLIP_CENTRE_CROP
    assert (as_published.averaging, default.averaging) == ("flat", "macro")
    shown = [getattr(protocol.judges["dino"], "preprocessing", None) for protocol in (as_published, default)]
    assert shown == [preprocessing.DINO_SQUASH, preprocessing.DINO_CENTRE_CROP]
    same = {"subjects", "prompts", "sampling", "resolution", "images_per_prompt", "identifier", "bootstrap"}
    assert as_published.model_dump(include=same) == default.model_dump(include=same)


def test_subjects_and_prompts_are_those_of_the_data_set(shared: Path) -> None:
    text = (shared / "data/dreambooth/dataset/prompts_and_classes.txt").read_text()
    classes = dict(line.split(",") for line in text.split("subject_name,class\n")[1].split("\n\n")[0].splitlines())
    lists = [re.findall(r"^'.*'", block, re.MULTILINE) for block in re.findall(r"\[\n(.*?)\]", text, re.DOTALL)]
    known = [[ast.literal_eval(line).replace("{0} {1}", "{subject}") for line in found] for found in lists]
    protocol = load_protocol(SubjectProtocol, "dreambooth/oft-v1")
    assert {name: entry.class_name for name, entry in protocol.subjects.items()} == classes
    assert [list(protocol.prompts[name]) for name in ("object", "live")] == known


def test_the_miniatures_protocol_has_its_subjects() -> None:
    protocol = load_protocol(SubjectProtocol, "tinyworld/dreambooth-v1")
    assert protocol.identifier == IDENTIFIER
    assert set(protocol.subjects) == set(SUBJECTS)
    for name, subject in SUBJECTS.items():
        assert protocol.subjects[name].class_name == subject.class_name
        assert tuple(protocol.prompt(name, template) for template in protocol.templates(name)) == subject.prompts


def test_the_map_protocols_are_the_papers() -> None:
    protocol = load_protocol(MapProtocol, "s2i/csail-v1")
    sampling = protocol.sampling
    assert (sampling.scheduler, sampling.steps, sampling.guidance) == ("ddim", 50, 9.0)
    assert (protocol.resolution, protocol.num_classes, protocol.images) == (512, 150, 2000)
    framing = {"scale": "short side to resolution", "image_filter": "bicubic", "label_filter": "nearest"}
    assert protocol.framing.model_dump() == framing | {"crop": "centre"}
    single = load_protocol(MapProtocol, "s2i/csail-single-scale-v1")
    scales = [getattr(one.judges["segmenter"], "short_sides", None) for one in (protocol, single)]
    assert scales == [CSAIL_SCALES, CSAIL_SINGLE_SCALE]
    assert load_protocol(MapProtocol, "tinyworld/s2i-v1").num_classes == len(LABELS) - 1


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 512},
        {"averaging": "flat"},
        {"seed": 1},
        {"images_per_prompt": 4},
        {"sampling": {"steps": 25}},
        {"prompts": {"two": ("a {subject} in the snow", "a {subject} by night")}},
        {"metrics": {"backbone": {"kind": "similarity", "judge": "clip"}}, "chosen_by": ("backbone", "backbone")},
        {"bootstrap": {"seed": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_changes_with_everything_that_is_stated(protocol: SubjectProtocol, change: dict[str, Any]) -> None:
    whole = protocol.model_dump(mode="json")
    assert SubjectProtocol.model_validate(whole).digest == protocol.digest
    assert SubjectProtocol.model_validate({**whole, **change}).digest != protocol.digest


def test_subjects_are_matched_by_whole_names(protocol: SubjectProtocol) -> None:
    assert protocol.entry("dog", "here").class_name == "dog"
    for part in ("backpack", "do", "Dog", "dog2"):
        with pytest.raises(
            UserError, match=f"^here: tests/two-subjects has no subject '{part}'.* It has dog, backpack_dog"
        ):
            protocol.entry(part, "here")


def test_the_prompt_of_a_class_of_two_words_needs_no_identifier() -> None:
    protocol = load_protocol(SubjectProtocol, "dreambooth/oft-v1")
    prompts = [protocol.prompt("wolf_plushie", "a {subject} in the snow", word) for word in (None, "", "sks")]
    assert prompts == [
        "a qwe stuffed animal in the snow",
        "a stuffed animal in the snow",
        "a sks stuffed animal in the snow",
    ]


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("dreambooth-v1", {"images_per_prompt": 0}, "images_per_prompt"),
        ("dreambooth-v1", {"images_per_prompt": 10**12}, "images_per_prompt"),
        ("dreambooth-v1", {"resolution": "big"}, "resolution"),
        ("dreambooth-v1", {"bootstrap": {"replicates": 10**12}}, "bootstrap.replicates"),
        ("dreambooth-v1", {"bootstrap": {"level": math.nan}}, "bootstrap.level"),
        ("dreambooth-v1", {"bootstrap": {"level": 1}}, "bootstrap.level"),
        ("dreambooth-v1", {"sampling": {"guidance": math.nan}}, "sampling.guidance"),
        ("dreambooth-v1", {"prompts": {"robot": ["a {subject} in {place}"]}}, "'a {subject} in {place}'"),
        ("dreambooth-v1", {"prompts": {"robot": ["a {subject} {"]}}, "'a {subject} {'"),
        ("dreambooth-v1", {"prompts": {"robot": ["a {subject} and a {subject}"]}}, "expected {subject} once"),
        ("dreambooth-v1", {"chosen_by": ["CLIP-T"]}, "chosen_by"),
        ("s2i-v1", {"num_classes": -1}, "num_classes"),
        ("s2i-v1", {"distribution_replicates": 10**9}, "distribution_replicates"),
        ("s2i-v1", {"metrics": {"mIoU": 3}}, "metrics.mIoU"),
    ],
)
def test_numbers_and_templates_out_of_range_are_faults(
    name: str, change: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    whole = yaml.safe_load((FILES / f"tinyworld/{name}.yaml").read_text())
    merged = {
        key: {**whole.get(key, {}), **value} if isinstance(value, dict) else value for key, value in change.items()
    }
    own.write_text(yaml.safe_dump({**whole, "name": "own/one", **merged}))
    with pytest.raises(UserError) as refused:
        load_any_protocol(own)
    assert any(line.startswith(f"{own}:") and fault in line for line in str(refused.value).splitlines())


def test_faults_of_a_file_are_reported_with_their_lines(tmp_path: Path) -> None:
    text = (FILES / "tinyworld/dreambooth-v1.yaml").read_text()
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(UserError, match=r"own\.yaml: name: tinyworld/dreambooth-v1 is the name of a shipped protocol"):
        load_protocol(SubjectProtocol, own)
    own.write_text(
        text.replace("name: tinyworld/dreambooth-v1", "name: own/one").replace("averaging: macro", "averaging: mean")
    )
    line = 1 + next(k for k, row in enumerate(own.read_text().splitlines()) if row.startswith("averaging"))
    with pytest.raises(UserError, match=rf"own\.yaml:{line}: averaging"):
        load_protocol(SubjectProtocol, own)
    own.write_text(text.replace("name: tinyworld/", "name: own/").replace("judge: clip}", "judge: clop}", 1))
    with pytest.raises(
        UserError, match=r"metrics\.CLIP-I\.judge: 'clop'; Did you mean 'clip'\? expected one of backbone, clip"
    ):
        load_protocol(SubjectProtocol, own)
    with pytest.raises(
        UserError, match=r"^no protocol 'dreambooth/oft-v2'.* Did you mean 'dreambooth/oft-v1'\? Shipped: "
    ):
        load_protocol(SubjectProtocol, "dreambooth/oft-v2")
