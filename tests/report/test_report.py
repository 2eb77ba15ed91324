"""`report`: a complete page without scripts, tables for other programs, and what is refused."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.results import MetricRecord, Results, ScorerRecord
from ether_diffusion.generation import Sampling, generate, load_pipeline
from ether_diffusion.report.curves import POINTS, Series, chart, smoothed
from ether_diffusion.report.page import write_report
from ether_diffusion.report.reported_run import read_runs
from ether_diffusion.report.score_tables import score_tables
from ether_diffusion.report.tables import Table, Value, markdown_code, to_csv, to_text
from ether_diffusion_cli import main

HOSTILE = '<script>alert("x")</script> & <img src="http://example.org/a.png" onload=x> a | b_c 50% $5 \\ {y} \x07'
VOID = {"meta", "img"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), "")


class Page(HTMLParser):
    """A parsed page: every element with its attributes and text; fails if tags are not closed in order."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.words.setdefault(self.open[-1], []).append(data)

    def images(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.elements if tag == "img"]
        heads, datas = zip(*(source.split(",", 1) for source in sources), strict=True)
        assert set(heads) <= {"data:image/png;base64", "data:image/jpeg;base64"}
        return [Image.open(io.BytesIO(base64.b64decode(data, validate=True))) for data in datas]


def results(
    value: float, *, protocol: str = "dreambooth/some-v1", subjects: tuple[str, ...] = ("dog", "cat")
) -> Results:
    """Results of an evaluation with made-up numbers."""
    per_subject = {subject: value + 0.01 * k for k, subject in enumerate(subjects)}
    return Results(
        protocol=protocol,
        protocol_digest="ab" * 32,
        run={},
        judges={"dino": ScorerRecord(source="some", sha256="cd" * 32)},
        versions={},
        counts={"subjects": 2, "prompts": 1, "images": 8, "black": 1, "missing": 0, "duplicate": 0},
        metrics={
            "DINO": MetricRecord(
                value=value,
                low=value - 0.1,
                high=value + 0.1,
                higher_is_better=True,
                per_subject=per_subject,
                per_prompt={HOSTILE: value},
            ),
            "FID": MetricRecord(value=100 * value, low=30, high=40, higher_is_better=False),
        },
        ceilings={"DINO": 0.7},
    )


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with images of two prompts, one of them hostile, and results."""
    folder = tmp_path_factory.mktemp("runs") / "first<b>&"
    shutil.copytree(finished_run, folder)
    pipeline, adapter = load_pipeline(folder)
    assert adapter is not None
    record = {"adapter": adapter.digest}
    sampling = Sampling(steps=1, guidance=1.0)
    generate(pipeline, [HOSTILE, "a qwe toy"], folder / "images", images_per_prompt=2, sampling=sampling, record=record)
    results(0.6).save(folder / "results.json")
    return folder


@pytest.fixture(scope="module")
def second(run: Path) -> Path:
    """Another run, with other values and settings, and a missing image."""
    folder = run.with_name("second")
    shutil.copytree(run, folder)
    results(0.5).save(folder / "results.json")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("learning_rate: 0.006", "learning_rate: 0.5"))
    sorted((folder / "images").glob("01-*.png"))[0].unlink()
    return folder


def test_the_page_is_complete_and_runs_nothing(run: Path, tmp_path: Path) -> None:
    """Tags close in order; there are no scripts and no links; texts are unchanged."""
    (file,) = write_report([run], [tmp_path / "report.html"])
    page = Page(file)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "b"}
    names = {name for _, attributes in page.elements for name in attributes}
    assert not any(name.startswith("on") or name in ("href", "srcset", "style", "action") for name in names)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "url(" not in "".join(page.words["style"])
    assert "@import" not in "".join(page.words["style"])
    assert "".join(page.words["h1"]) == "ether_diffusion: first<b>&"
    assert HOSTILE.replace("\x07", "\ufffd") in page.words["th"]
    shown = page.images()
    # Five photos, two prompts with two images each, and the validation sheets.
    assert len(shown) == 5 + 4 + len(list(run.glob("samples/*.png")))
    with Image.open(sorted((run / "images").glob("01-*.png"))[1]) as image:
        assert any(np.array_equal(np.asarray(one), np.asarray(image.convert("RGB"))) for one in shown)


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome to show the page")
def test_a_browser_shows_the_page_and_refuses_nothing_in_it(run: Path, second: Path, tmp_path: Path) -> None:
    (file,) = write_report([run, second], [tmp_path / "report.html"])
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/profile",
    ]
    look = ["--enable-logging=stderr", "--window-size=1300,4000", f"--screenshot={tmp_path}/page.png"]
    log = subprocess.run(
        [BROWSER, *options, *look, file.as_uri()], check=True, capture_output=True, text=True, timeout=120
    ).stderr
    assert not re.findall(r".*(?:CONSOLE|Refused to).*", log)
    shown = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    # The photo is shown with each pixel as a square of four.
    photo = np.asarray(Page(file).images()[0].convert("RGB")).repeat(2, axis=0).repeat(2, axis=1)
    rows, columns = np.nonzero((shown == photo[0, 0]).all(axis=2))
    height, width = photo.shape[:2]
    assert any(np.array_equal(shown[y : y + height, x : x + width], photo) for y, x in zip(rows, columns, strict=True))


def test_several_runs_are_shown_side_by_side_and_repeat_to_the_byte(run: Path, second: Path, tmp_path: Path) -> None:
    (file,) = write_report([run, second], [tmp_path / "report.html"])
    page = Page(file)
    assert page.words["strong"] == ["0.600", "50.0"]  # the best DINO and the best FID
    assert "[0.500, 0.700]" in " ".join(page.words["span"])
    assert "real images" in page.words["th"]
    assert page.words["td"].count("8, 1 black") == 2
    assert any("is missing" in words for words in page.words["span"])
    text = file.read_text()
    differ = text[text.index("Where they differ") : text.index("All settings")]
    assert re.findall(r'<th scope="row">([^<]+)</th>', differ) == ["training.learning_rate"]
    assert write_report([run, second], [tmp_path / "again.html"])[0].read_bytes() == file.read_bytes()


def test_a_method_of_a_benchmark_is_shown_with_the_trainings_of_its_subjects(run: Path, tmp_path: Path) -> None:
    """Their common settings, the mean of their losses, and each subject's own photos next to its images."""
    method = tmp_path / "ether_plus"
    for k, subject in enumerate(("robot", "monster")):
        training = method / "runs" / subject
        shutil.copytree(run, training, ignore=shutil.ignore_patterns("images", "results.json", "samples"))
        config = (training / "config.yaml").read_text()
        (training / "config.yaml").write_text(config.replace("builtin:robot", f"builtin:{subject}"))
        rows = [{"step": step, "loss": step + 2.0 * k} for step in (1, 2, 3)]
        (training / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.copytree(run / "images", method / "images" / subject)
    results(0.6, subjects=("robot", "monster")).save(method / "results.json")
    (found,) = read_runs([method])
    assert [list(one.values) for one in found.losses] == [[2.0, 3.0, 4.0]]
    assert found.facts["trainings"] == "2"
    assert "identifier" in found.config["data"]
    assert "instance_dir" not in found.config["data"]
    page = Page(write_report([method], [tmp_path / "report.html"])[0])
    photos = [a["alt"] for tag, a in page.elements if tag == "img" and a["alt"].startswith("builtin:")]
    assert {photo.split(":")[1] for photo in photos} == {"robot", "monster"}
    # Their prompts are equal, but each subject has a grid of its own.
    assert page.words["th"].count("photos") == 2


def test_sample_sheets_are_in_the_order_of_their_steps(run: Path, tmp_path: Path) -> None:
    """In the order of text, step-1000000 comes before step-999999."""
    samples = tmp_path / "run/samples"
    samples.mkdir(parents=True)
    shutil.copy(run / "config.yaml", samples.parent)
    for name in ("step-1000000", "step-999999", "step-000500", "notes"):
        Image.new("RGB", (8, 8)).save(samples / f"{name}.png")
    (found,) = read_runs([samples.parent])
    assert [file.stem for file in found.samples] == ["step-000500", "step-999999", "step-1000000"]


def test_csv_holds_every_number_in_full(run: Path, second: Path, tmp_path: Path) -> None:
    (file,) = write_report([run, second], [tmp_path / "scores.csv"])
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    main_table = [row for row in rows if row["table"] == "dreambooth/some-v1"]
    assert [(row["row"], row["column"], float(row["value"])) for row in main_table] == [
        ("first<b>&", "DINO", 0.6),
        ("first<b>&", "FID", 60.0),
        ("second", "DINO", 0.5),
        ("second", "FID", 50.0),
        ("real images", "DINO", 0.7),
    ]
    assert float(main_table[0]["low"]) == 0.6 - 0.1
    assert {row["row"] for row in rows} >= {"dog", "cat", HOSTILE}


def test_markdown_and_latex_keep_their_columns_for_any_text(run: Path, second: Path, tmp_path: Path) -> None:
    markdown, latex = write_report([run, second], [tmp_path / "scores.md", tmp_path / "scores.tex"])
    tables = markdown.read_text().split("\n## ")
    for table in tables:
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "**0.600** [0.500, 0.700]" in tables[0]
    assert not re.search(r"(?<!\\)<", markdown.read_text())
    blocks = re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", latex.read_text(), re.S)
    assert len(blocks) == len(tables)
    for columns, block in blocks:
        lines = [line.removesuffix(r" \\") for line in block.splitlines() if line.endswith(r" \\")]
        assert {len(re.split(r"(?<!\\)&", line)) for line in lines} == {len(columns)}
    assert r"50\% \$5 \textbackslash{} \{y\}" in latex.read_text()
    assert latex.read_text().count("{") == latex.read_text().count("}")


def test_results_that_do_not_compare_are_in_different_tables(run: Path, tmp_path: Path) -> None:
    others = [results(0.9, protocol="dreambooth/other-v1"), results(0.8, subjects=("dog",))]
    files = [one.save(tmp_path / f"{k}/results.json") for k, one in enumerate(others)]
    (file,) = write_report([run, *files], [tmp_path / "report.md"])
    words = file.read_text()
    assert "**" not in words  # a single row has no best value
    assert words.count("## dreambooth/some-v1\n") == 2
    assert words.count("## dreambooth/other-v1\n") == 1
    assert "DINO of different subjects: only one has cat" in words


@pytest.mark.parametrize("order", list(permutations("abc")), ids="".join)
def test_tables_hold_the_same_rows_in_any_order_of_the_results(order: tuple[str, ...], tmp_path: Path) -> None:
    """b and c record different photos; a records none and compares with either."""
    data = {"a": {}, "b": {"photos of dog": "b" * 64}, "c": {"photos of dog": "c" * 64}}
    files = [results(0.5).model_copy(update={"data": data[k]}).save(tmp_path / k / "results.json") for k in order]
    tables = [table for table in score_tables(read_runs(files)) if table.title == "dreambooth/some-v1"]
    rows = [{str(row[0])[0] for row in table.rows if row[0] != "real images"} for table in tables]
    assert sorted(map(sorted, rows)) == [["a", "b"], ["a", "c"]]
    assert "photos of dog differ" in tables[1].note


def test_a_file_of_results_is_labelled_with_its_folder_unless_that_is_shown_too(run: Path, second: Path) -> None:
    files = [folder / "results.json" for folder in (run, second)]
    assert [one.label for one in read_runs(files)] == ["first<b>&", "second"]
    assert [one.label for one in read_runs([run, files[0]])] == ["first<b>&", "results.json"]


def test_smoothing_is_the_mean_of_a_window_and_keeps_gaps() -> None:
    values = np.random.default_rng(0).normal(size=40)
    values[[7, 20, 21]] = np.nan
    slow = [np.nanmean(values[max(0, k - 3) : k + 4]) if np.isfinite(values[k]) else np.nan for k in range(40)]
    np.testing.assert_allclose(smoothed(values, 7), np.array(slow), rtol=1e-12)
    np.testing.assert_allclose(smoothed(values, 1), values, rtol=1e-12)


def test_a_curve_runs_through_its_values() -> None:
    """A straight line of 1,000 steps is plotted straight, from the first to the last; a gap breaks it in two."""
    plotted = chart("loss", [Series("a", range(1, 1001), np.linspace(2, 1, 1000).tolist())])
    assert plotted is not None
    (line,) = plotted.lines
    assert len(_points(line.single)) == len(_points(line.smooth)) == POINTS
    x, y = np.array(_points(line.single)).T
    np.testing.assert_allclose(np.diff(y) / np.diff(x), np.diff(y).sum() / np.diff(x).sum(), atol=0.1)
    assert y[-1] > y[0]  # in SVG, y points down: a falling loss
    gap = chart("loss", [Series("a", range(9), [1, 1, 2, 2, float("nan"), 3, 3, 1, 1])])
    assert gap is not None
    assert all(path.count("M") == 2 for path in (gap.lines[0].single, gap.lines[0].smooth))
    assert chart("loss", [Series("a", [1, 2], [float("nan")] * 2)]) is None
    assert chart("loss", [Series("a", [1], [0.0])]) is not None


def test_broken_files_are_noted_and_nothing_outside_the_run_is_shown(second: Path, tmp_path: Path) -> None:
    folder = tmp_path / "crashed"
    shutil.copytree(second, folder)
    shutil.rmtree(folder / "adapter")
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 7, "loss": null}\n{"step": 8, "lo')
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    row = {"file": "../../secret.png", "prompt": "stolen"}
    (folder / "images/images.jsonl").write_text(json.dumps(row) + "\n")
    page = Page(write_report([folder], [tmp_path / "report.html"])[0])
    notes = " ".join(page.words["p"])
    assert "metrics.jsonl: line 8, the last one, is cut short" in notes
    assert "1 steps without a finite loss" in notes
    assert "no adapter/ yet" in notes
    assert "stolen" not in page.words["th"]


@pytest.mark.parametrize(("method", "missing"), [("lora", ["adapter"]), ("full", ["unet"]), ("none", [])])
def test_a_note_names_the_folder_that_an_unfinished_training_has_not_saved(
    second: Path, tmp_path: Path, method: str, missing: list
) -> None:
    """The folder depends on the method: `none` saves only its condition encoder."""
    config = yaml.safe_load((second / "config.yaml").read_text()) | {"adapter": {"method": method}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    page = Page(write_report([tmp_path / "run"], [tmp_path / "report.html"])[0])
    assert re.findall(r"no (\w+)/ yet", " ".join(page.words.get("p", []))) == missing


def test_a_path_that_is_no_run_is_refused_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    results(0.5).save(damaged / "results.json")
    (damaged / "results.json").write_text('{"protocol": "x"}')
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.yaml", bare)
    page = str(tmp_path / "report.html")
    for arguments, message in (
        ([tmp_path / "emty", "--output", page], "no such run folder. Did you mean 'empty'?"),
        ([empty, "--output", page], "expected config.yaml, metrics.jsonl, results.json"),
        ([damaged, "--output", page], "not results of an evaluation"),
        ([run, run, "--output", page], "is given twice"),
        ([run, "--output", tmp_path / "report.pdf"], "expected a name that ends in .html, .csv, .md, .tex"),
        ([run, "--output", empty.with_suffix(".html"), "--output", bare], "expected a name that ends in"),
        ([bare, "--output", tmp_path / "scores.md", "--output", page], "no scores in"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        assert message in error
    assert not list(tmp_path.glob("*.html"))
    assert main(["report", str(bare), "--output", page]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    with pytest.raises(UserError, match="is no file"):
        write_report([run], [tmp_path.rename(tmp_path.with_suffix(".md"))])


def test_a_spreadsheet_takes_no_name_for_a_formula_and_markdown_shows_code_as_it_is() -> None:
    table = Table("=1+1", ("", "@sum"), (("-2+3", Value(-0.5)), ("plain", Value(1.0))))
    rows = list(csv.reader(io.StringIO(to_csv([table]))))
    assert rows[1] == ["'=1+1", "'-2+3", "'@sum", "-0.5", "", ""]
    assert rows[2][1] == "plain"
    assert markdown_code("a ``` b") == "````bash\na ``` b\n````"


def test_a_terminal_gets_names_without_escapes_and_a_star_for_the_best() -> None:
    table = Table("learning_rate", ("", "a|b"), (("x_y", Value(0.5, 0.4, 0.6, best=True)), ("long name", Value(None))))
    assert to_text([table]).splitlines() == [
        "learning_rate",
        f"{'a|b':>32}",
        "x_y        *0.500 [0.400, 0.600]",
        f"long name{'-':>23}",
    ]


MALFORMED = (
    ("config.yaml", "a: [", 2),
    ("config.yaml", "- 1", 2),
    ("config.yaml", "adapter: text", 2),
    ("config.yaml", "data: {more_subjects: 3}", 2),
    ("config.yaml", "data: {instance_dir: [1]}", 2),
    ("config.yaml", "\xff", 2),
    ("results.json", "[]", 2),
    ("results.json", '{"protocol": "x"}', 2),
    ("scores.json", "[]", 2),
    ("scores.json", '{"scores": {"after": {"dino": "high"}}}', 2),
    ("scores.json", '{"scores": {"after": {"dino": 1}}, "prompts": 3}', 2),
    ("scores.json", '{"scores": {"after": {"dino": 1}}, "sampling": "ddim"}', 2),
    ("adapter/adapter_config.json", "[]", 0),
    ("metrics.jsonl", "step 1\n", 2),
    ("metrics.jsonl", "[]\n", 2),
    ("metrics.jsonl", "[" * 100_000, 2),
    ("metrics.jsonl", '{"loss": 1}\n', 2),
    ("metrics.jsonl", '{"step": 1, "loss": "x"}\n', 2),
    ("metrics.jsonl", '{"step": 1, "loss": [1]}\n', 2),
    ("metrics.jsonl", f'{{"step": 1, "loss": {10**400}}}\n', 2),
    ("metrics.jsonl", '{"step": 1, "loss": NaN, "seconds": null}\n{"step": 2, "lo', 0),
    ("images/images.jsonl", '{"file": "a.png", "prompt": 3}\n', 2),
    ("images/images.jsonl", '{"file": ["a"], "prompt": "a"}\n', 2),
    ("images/images.jsonl", '{"file": "a.png", "prompt": "a", "name": ["b"], "condition": "c"}\n', 2),
    ("images/images.jsonl", '{"file": "a.png", "prompt": "a", "name": "b", "condition": "c", "height": "tall"}\n', 2),
)


@pytest.mark.parametrize(("file", "content", "code"), MALFORMED)
def test_malformed_files_of_a_run_are_one_line_or_a_note(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str, code: int
) -> None:
    """What scores and settings need is an error with the file's path; a log's lines are left out, and counted."""
    own = Path(shutil.copytree(run, tmp_path / "own"))
    (own / file).write_text(content, encoding="latin-1")
    assert main(["report", str(own), "--output", str(tmp_path / "report.html")]) == code
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == (code == 2)
    shown = errors[0] if code else (tmp_path / "report.html").read_text()
    assert str(own / file) in shown or (code == 0 and file.startswith("adapter") and str(own / "adapter") in shown)


def _points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]
