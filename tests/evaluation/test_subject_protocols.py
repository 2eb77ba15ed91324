"""Subjects under a protocol: averages of the scorers' values over every image, in any order; whole names only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.ceilings import Ceilings, find_ceilings
from ether_diffusion.evaluation.comparison import check_comparable
from ether_diffusion.evaluation.protocols import SubjectProtocol
from ether_diffusion.evaluation.results import Results
from ether_diffusion.evaluation.scorers import Loaded, load_scorers
from ether_diffusion.evaluation.subject_images import find_images, recorded_settings
from ether_diffusion.evaluation.subject_scores import score_subject, subject_results
from ether_diffusion.pictures import save_png

ListImages = Callable[[Path, Mapping[str, str]], None]
Scorers = dict[str, Loaded]


def evaluated(
    protocol: SubjectProtocol,
    images: Path,
    photos: Path,
    scorers: Scorers,
    *,
    batch_size: int = 32,
    turned: bool = False,
) -> Results:
    found = find_images(protocol, images, photos)
    scored = [score_subject(one, protocol, scorers, batch_size) for one in (found[::-1] if turned else found)]
    return subject_results(protocol, scored, scorers, recorded_settings(found))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


def test_values_are_the_means_of_the_scorers_cosines(
    protocol: SubjectProtocol, scorers: Scorers, images: Path, photos: Path
) -> None:
    backbone, clip = scorers["backbone"].network, scorers["clip"].network
    cosines, texts = {}, {}
    for subject, word in (("dog", "dog"), ("backpack_dog", "toy")):
        rows = rows_of(images / subject)
        generated = [Image.open(images / subject / row["file"]) for row in rows]
        real = [Image.open(file) for file in sorted((photos / subject).iterdir())]
        cosines[subject] = backbone.image_features(generated) @ backbone.image_features(real).T
        plain = [row["prompt"].replace("qwe ", "") for row in rows]
        assert plain[0] == f"a {word} in the snow"
        texts[subject] = (clip.image_features(generated) * clip.text_features(plain)).sum(dim=1)
    macro = evaluated(protocol, images, photos, scorers)
    means = {subject: float(values.mean()) for subject, values in cosines.items()}
    assert macro.metrics["backbone"].per_subject == pytest.approx(means, abs=1e-5)
    assert macro.metrics["backbone"].value == pytest.approx(sum(means.values()) / 2, abs=1e-5)
    assert macro.metrics["CLIP-T"].value == pytest.approx(
        float(torch.stack([values.mean() for values in texts.values()]).mean()), abs=1e-5
    )
    night = [float(values[2:].mean()) for values in cosines.values()]
    assert macro.metrics["backbone"].per_prompt["a {subject} at night"] == pytest.approx(sum(night) / 2, abs=1e-5)
    flat = evaluated(protocol.model_copy(update={"averaging": "flat"}), images, photos, scorers)
    every = torch.cat([values.flatten() for values in cosines.values()])
    assert len(every) == 4 * 3 + 4 * 5
    assert flat.metrics["backbone"].value == pytest.approx(float(every.mean()), abs=1e-5)
    assert flat.metrics["backbone"].value != pytest.approx(macro.metrics["backbone"].value, abs=1e-3)


def test_ceilings_are_of_pairs_of_two_photos(
    protocol: SubjectProtocol, scorers: Scorers, images: Path, photos: Path
) -> None:
    means = []
    for subject in ("dog", "backpack_dog"):
        features = scorers["backbone"].network.image_features([Image.open(f) for f in (photos / subject).iterdir()])
        pairs = [float(features[i] @ features[j]) for i in range(len(features)) for j in range(i)]
        means.append(sum(pairs) / len(pairs))
    found = evaluated(protocol, images, photos, scorers)
    assert found.ceilings["backbone"] == pytest.approx(sum(means) / 2, abs=1e-5)
    assert set(found.ceilings) == {"backbone", "CLIP-I"}


def test_ceilings_need_no_images_and_are_reported_by_subject(
    protocol: SubjectProtocol, scorers: Scorers, images: Path, photos: Path, tmp_path: Path
) -> None:
    scored = evaluated(protocol, images, photos, scorers)
    found = find_ceilings(protocol, photos, scorers, batch_size=2)
    assert found.ceilings == pytest.approx(scored.ceilings, abs=1e-6)
    for name, values in found.ceilings_per_subject.items():
        assert set(values) == {"dog", "backpack_dog"}
        assert values == pytest.approx(scored.ceilings_per_subject[name], abs=1e-6)
        assert sum(values.values()) / 2 == pytest.approx(found.ceilings[name])
    assert (found.data, found.absent_subjects) == (scored.data, [])
    assert Ceilings.model_validate_json(found.save(tmp_path / "ceilings.json").read_text()) == found
    some = Path(shutil.copytree(photos, tmp_path / "some"))
    shutil.rmtree(some / "backpack_dog")
    part = find_ceilings(protocol, some, scorers)
    assert part.absent_subjects == ["backpack_dog"]
    assert part.table().splitlines()[-1] == "1 of 2 subjects"
    assert part.ceilings == {name: values["dog"] for name, values in part.ceilings_per_subject.items()}
    for name in ("0.png", "1.png"):
        (some / "dog" / name).unlink()
    with pytest.raises(UserError, match=r"no folder of a subject of tests/two-subjects with two photos or more"):
        find_ceilings(protocol, some, scorers)


def test_a_subject_does_not_collect_images_of_subjects_whose_names_contain_its_own(
    protocol: SubjectProtocol, scorers: Scorers, images: Path, photos: Path, tmp_path: Path
) -> None:
    both = evaluated(protocol, images, photos, scorers)
    alone = tmp_path / "alone"
    alone.mkdir()
    (images / "dog").rename(alone / "dog")
    found = evaluated(protocol, alone, photos, scorers)
    assert found.counts["images"] == 4
    for name, metric in found.metrics.items():
        assert metric.per_subject == pytest.approx({"dog": both.metrics[name].per_subject["dog"]}, abs=1e-6)
    (images / "backpack_dog").rename(images / "backpack")
    with pytest.raises(
        UserError, match=r"tests/two-subjects has no subject 'backpack'\. Did you mean 'backpack_dog'\?"
    ):
        find_images(protocol, images, photos)


def test_neither_order_nor_batches_change_results(
    protocol: SubjectProtocol,
    scorers: Scorers,
    fresh_scorers: Scorers,
    images: Path,
    photos: Path,
    list_images: ListImages,
) -> None:
    first = evaluated(protocol, images, photos, scorers)
    for subject in ("dog", "backpack_dog"):
        list_images(images / subject, {row["file"]: row["prompt"] for row in reversed(rows_of(images / subject))})
    again = evaluated(protocol, images, photos, fresh_scorers, batch_size=3, turned=True)
    assert again.counts == first.counts
    assert again.ceilings == pytest.approx(first.ceilings, abs=1e-5)
    for name, metric in first.metrics.items():
        assert again.metrics[name].per_prompt == pytest.approx(metric.per_prompt, abs=1e-5)
        for field in ("value", "low", "high"):
            assert getattr(again.metrics[name], field) == pytest.approx(getattr(metric, field), abs=1e-5)
            assert metric.low < metric.value < metric.high


def test_folders_of_prompts_give_the_results_of_a_list(
    protocol: SubjectProtocol, scorers: Scorers, images: Path, photos: Path
) -> None:
    first = evaluated(protocol, images, photos, scorers)
    for subject in ("dog", "backpack_dog"):
        for row in rows_of(images / subject):
            number = f"{int(row['file'][0]):02d}"
            inner = images / subject / (row["prompt"] if subject == "dog" else number)
            inner.mkdir(exist_ok=True)
            (images / subject / row["file"]).rename(inner / row["file"])
        (images / subject / "images.jsonl").unlink()
    again = evaluated(protocol, images, photos, scorers)
    assert again.metrics == first.metrics
    assert again.run == {"identifier": "qwe", "adapters": {}, "not_told": "settings"}
    assert first.run["adapters"] == {"dog": "of dog", "backpack_dog": "of backpack_dog"}
    assert first.run["steps"] == 7


def test_black_missing_and_duplicate_images_are_counted_and_black_ones_scored(
    protocol: SubjectProtocol, scorers: Scorers, images: Path, photos: Path
) -> None:
    whole = evaluated(protocol, images, photos, scorers)
    faults = {"black": 0, "missing": 0, "duplicate": 0}
    assert whole.counts == {"subjects": 2, "prompts": 4, "images": 8, "expected": 8, **faults}
    for name in ("0-0.png", "0-1.png"):
        save_png(Image.new("RGB", (64, 64)), images / "dog" / name)
    (images / "dog" / "1-1.png").unlink()
    save_png(Image.open(images / "backpack_dog" / "0-0.png"), images / "backpack_dog" / "1-0.png", {"made": "anew"})
    found = evaluated(protocol, images, photos, scorers)
    counts = {"subjects": 2, "prompts": 4, "images": 7, "expected": 8, "black": 2, "missing": 1, "duplicate": 1}
    assert found.counts == counts
    assert found.counted() == "2 subjects, 7 of 8 images; 1 missing, 2 black, 1 duplicate"
    backbone = scorers["backbone"].network
    real = backbone.image_features([Image.open(file) for file in sorted((photos / "dog").iterdir())])
    black = float((backbone.image_features([Image.new("RGB", (64, 64))]) @ real.T).mean())
    kept = float((backbone.image_features([Image.open(images / "dog" / "1-0.png")]) @ real.T).mean())
    assert found.metrics["backbone"].per_subject["dog"] == pytest.approx((2 * black + kept) / 3, abs=1e-5)


def test_absent_subjects_are_named_and_their_images_count_as_missing_if_they_were_asked_for(
    protocol: SubjectProtocol, scorers: Scorers, images: Path, photos: Path
) -> None:
    shutil.rmtree(images / "backpack_dog")
    (images / "dog/1-1.png").unlink()
    found = find_images(protocol, images, photos)
    scored = [score_subject(one, protocol, scorers) for one in found]
    folder = subject_results(protocol, scored, scorers, recorded_settings(found))
    part = subject_results(protocol, scored, scorers, recorded_settings(found), asked=["dog"])
    assert folder.absent_subjects == part.absent_subjects == ["backpack_dog"]
    assert folder.metrics == part.metrics
    of_all, of_one = (f"1 of 2 subjects, 3 of {n} images; {n - 3} missing, 0 black, 0 duplicate" for n in (8, 4))
    assert (folder.counted(), part.counted()) == (f"{of_all}; without backpack_dog", f"{of_one}; without backpack_dog")


def test_images_of_equal_names_in_different_folders_are_different_images(
    protocol: SubjectProtocol, scorers: Scorers, images: Path, photos: Path, list_images: ListImages
) -> None:
    whole, prompts = evaluated(protocol, images, photos, scorers), {}
    for row in rows_of(images / "dog"):
        inner = f"{row['file'][2]}/{row['file'][0]}.png"
        (images / "dog" / inner).parent.mkdir(exist_ok=True)
        (images / "dog" / row["file"]).rename(images / "dog" / inner)
        prompts[inner] = row["prompt"]
    assert len({Path(name).name for name in prompts}) < len(prompts)
    list_images(images / "dog", prompts)
    found = evaluated(protocol, images, photos, scorers)
    assert found.counts == whole.counts
    assert found.metrics == whole.metrics


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "base_sha256",
            r"^backpack_dog and dog were generated with bases of different weights \(digests one and",
        ),
        ("method", r"^backpack_dog and dog were generated by different methods: one and other\."),
    ],
)
def test_subjects_of_different_methods_are_not_averaged(
    protocol: SubjectProtocol, images: Path, photos: Path, key: str, message: str
) -> None:
    for subject, value in (("dog", "other"), ("backpack_dog", "one")):
        rows = [json.dumps(row | {key: value}) + "\n" for row in rows_of(images / subject)]
        (images / subject / "images.jsonl").write_text("".join(rows))
    with pytest.raises(UserError, match=message):
        recorded_settings(find_images(protocol, images, photos))


def test_images_that_the_protocol_does_not_ask_for_are_refused(
    protocol: SubjectProtocol, images: Path, photos: Path, list_images: ListImages, tmp_path: Path
) -> None:
    prompts = {row["file"]: row["prompt"] for row in rows_of(images / "dog")}
    list_images(images / "dog", prompts | {"2-0.png": "a qwe dog in the fog"})
    with pytest.raises(UserError, match=r"2-0\.png: tests/two-subjects has no prompt 'a qwe dog in the fog' for dog"):
        find_images(protocol, images, photos)
    list_images(images / "dog", prompts | {"0-2.png": "a qwe dog in the snow"})
    with pytest.raises(UserError, match=r"dog: 3 images of 'a qwe dog in the snow'; tests/two-subjects takes 2"):
        find_images(protocol, images, photos)
    list_images(images / "dog", prompts | {"../dog/0-0.png": "a qwe dog in the snow"})
    with pytest.raises(UserError, match=r"images\.jsonl:5: \.\./dog/0-0\.png is outside the folder"):
        find_images(protocol, images, photos)
    with pytest.raises(UserError, match=r"with identifier 'sks'; expected one like 'a sks toy in the snow'"):
        find_images(protocol, images, photos, "sks")
    (images / "dog" / "images.jsonl").unlink()
    with pytest.raises(UserError, match=r"dog: holds 4 images without prompts; expected a folder for each subject"):
        find_images(protocol, images, photos)
    with pytest.raises(UserError, match=r"no such folder; expected a folder for each subject"):
        find_images(protocol, tmp_path / "nothing", photos)


@pytest.mark.parametrize(
    ("key", "recorded", "stated"),
    [
        ("seed", 1, "0"),
        ("scheduler", "ddim", "'dpm++'"),
        ("steps", 8, "7"),
        ("guidance", 7.5, "3.0"),
        ("negative_prompt", "blurry", "''"),
        ("resolution", 512, "64"),
    ],
)
def test_images_of_other_generation_settings_are_refused(
    protocol: SubjectProtocol, images: Path, photos: Path, key: str, recorded: Any, stated: str
) -> None:
    """Even if only one of many images differs."""
    rows = rows_of(images / "dog")
    rows[2][key] = recorded
    (images / "dog/images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as refused:
        find_images(protocol, images, photos)
    fault = f"1-0.png was generated with {key} {recorded!r}; tests/two-subjects states {stated}."
    assert str(refused.value) == f"{images}/dog/images.jsonl:3: {fault}"


def test_settings_that_images_do_not_record_are_named(
    protocol: SubjectProtocol, scorers: Scorers, images: Path, photos: Path
) -> None:
    assert "not_told" not in evaluated(protocol, images, photos, scorers).run
    rows = rows_of(images / "dog")
    del rows[1]["guidance"]
    rows[3] |= {"seed": None, "resolution": None}  # the size can be seen
    (images / "dog/images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluated(protocol, images, photos, scorers)
    assert found.run["not_told"] == "seed, guidance"
    assert found.counted().endswith("0 duplicate; generated with seed, guidance not recorded")


def test_an_image_of_another_size_is_refused(
    protocol: SubjectProtocol, scorers: Scorers, images: Path, photos: Path
) -> None:
    save_png(Image.new("RGB", (65, 64), "red"), images / "dog" / "0-0.png")
    with pytest.raises(UserError, match=r"0-0\.png: 65 x 64; tests/two-subjects states 64 x 64"):
        evaluated(protocol, images, photos, scorers)


def test_a_scorer_of_other_weights_is_refused(protocol: SubjectProtocol, fresh_scorers: Scorers) -> None:
    stated = {name: scorer.sha256 for name, scorer in protocol.judges.items()}
    assert {name: scorer.sha256 for name, scorer in fresh_scorers.items()} == stated
    clip = protocol.judges["clip"]
    wrong = {**protocol.judges, "clip": clip.model_copy(update={"sha256": "0" * 64})}
    with pytest.raises(
        UserError, match=rf"scorer clip: its weights have digest {clip.sha256}; the protocol states 0000"
    ):
        load_scorers(wrong)
    network = fresh_scorers["backbone"].network
    changed = torch.nn.Linear(2, 2)
    before = replace(network, network=changed).digest
    with torch.no_grad():
        changed.bias[0] += 1e-3
    assert replace(network, network=changed).digest != before
    with pytest.raises(UserError, match=r"--scorer clop: the protocol has no such scorer\. Did you mean 'clip'\?"):
        load_scorers(protocol.judges, {"clop": "somewhere"})


def test_results_with_other_photos_do_not_compare(
    protocol: SubjectProtocol, scorers: Scorers, images: Path, photos: Path, tmp_path: Path
) -> None:
    others = Path(shutil.copytree(photos, tmp_path / "others"))
    (others / "dog" / "2.png").unlink()
    found = {name: evaluated(protocol, images, real, scorers) for name, real in (("one", photos), ("two", others))}
    changed = [name for name, digest in found["one"].data.items() if found["two"].data[name] != digest]
    assert changed == ["photos of dog"]
    with pytest.raises(UserError, match=r"^one and two cannot be compared: photos of dog differ"):
        check_comparable(found)


def test_results_survive_a_round_trip_through_their_file(
    protocol: SubjectProtocol, scorers: Scorers, images: Path, photos: Path, tmp_path: Path
) -> None:
    found = evaluated(protocol, images, photos, scorers)
    path = found.save(tmp_path / "results.json")
    assert Results.read(path) == Results.read(tmp_path) == found
    assert list(json.loads(path.read_text()))[:3] == ["protocol", "protocol_digest", "judges"]
    lines = found.table().splitlines()
    assert lines[0] == "tests/two-subjects: dpm++, 7 steps, guidance 3, seed 0"
    assert f"{found.metrics['backbone'].value:.3f}" in lines[2]
    path.write_text(path.read_text().replace('"counts"', '"count"'))
    with pytest.raises(UserError, match=r"results\.json: not results of an evaluation"):
        Results.read(path)
