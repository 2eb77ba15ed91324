"""Configs: what loads, how overrides merge, and that every fault is one line with its place and what is allowed."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from ether_diffusion import config as config_module
from ether_diffusion.config import ConfigError, Settings, find_config, load_config, to_yaml
from ether_diffusion.errors import UserError
from ether_diffusion.training.controllable_config import ControllableConfig
from ether_diffusion.training.dreambooth_config import DreamBoothConfig


class Precision(enum.Enum):
    FULL = "fp32"
    HALF = "fp16"


class Householder(Settings):
    method: Literal["ether", "ether_plus"] = "ether_plus"
    num_blocks: int = pydantic.Field(default=1, ge=1)
    learning_rate: float = 6e-3


class LowRank(Settings):
    method: Literal["lora"] = "lora"
    rank: int = pydantic.Field(default=4, ge=1, le=64)


class Data(Settings):
    instance_dir: Path
    class_name: str
    prompt: str = "a photo"


class Training(Settings):
    steps: int = pydantic.Field(default=10, ge=1)
    learning_rate: float | None = pydantic.Field(default=None, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warm_up: int | Literal["auto"] = "auto"
    clip: pydantic.PositiveFloat | None = 1.0
    prior: Annotated[Householder | LowRank, pydantic.Field(discriminator="method")] | None = None
    extra: LowRank | str = ""
    precision: Precision = Precision.FULL
    shuffle: bool = True
    names: list[str] = pydantic.Field(default=[])
    blocks: dict[str, int] = pydantic.Field(default={})

    @pydantic.field_validator("names")
    @classmethod
    def _few(cls, names: list[str]) -> list[str]:
        if len(names) > 2:
            raise ValueError("at most 2 names")
        return names


class Run(Settings):
    data: Data
    adapter: Annotated[Householder | LowRank, pydantic.Field(discriminator="method")] = Householder()
    training: Training = Training()
    seed: int = 0
    scale: float = 1.0


MINIMAL = "data:\n  instance_dir: photos\n  class_name: dog\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("run.yaml").write_text(text, encoding="utf-8")
        return "run.yaml"

    return write


def faults(source: str, *overrides: str, renamed: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, source, overrides, renamed=renamed or {})
    assert str(caught.value) == "\n".join(caught.value.faults)
    assert all("\n" not in fault for fault in caught.value.faults)
    return list(caught.value.faults)


def test_loads_defaults_and_values(write):
    run = load_config(Run, write("# runs\n" + MINIMAL + "training:\n  betas: [0, 0.5]\n  precision: fp16\nscale: 2\n"))
    assert run.data.instance_dir == Path("photos")
    assert run.training.betas == (0.0, 0.5)
    assert run.training.precision is Precision.HALF
    assert run.scale == 2.0
    assert isinstance(run.scale, float)
    assert run.adapter == Householder()


def test_overrides_are_yaml_and_the_last_wins(write):
    overrides = ["training.learning_rate=1e-4", "seed=1", "seed=2", "training.names=[a, b c]", "adapter.method=lora"]
    run = load_config(Run, write(MINIMAL), [*overrides, "training={steps: 7, shuffle: no}", "training.names[0]=z"])
    assert run.training.learning_rate == 1e-4
    assert run.seed == 2
    assert run.training.names == ["z", "b c"]
    assert run.training.steps == 7
    assert run.training.shuffle is False
    assert run.adapter == LowRank()


AS_TYPED = ["ph/dog #2", "#2", "&x y", "!x", "! x", "*x", "a: b", "a toy: oil, 4:3", "? a", "- a", "{a|b}", "{a, b}"]
AS_TYPED += ["| a", "> a", "%a", "@a", "`a", "--- a", "...", "a\n#b\nc", "}", "a  b", "it's", "<<: *x", "!!str 5", "=x"]


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_of_an_override_is_not_cut_or_taken_for_syntax(write, text):
    assert load_config(Run, write(MINIMAL), [f"data.prompt={text}"]).data.prompt == text


def loaded(source: Any, *overrides: str) -> tuple[Any, Sequence[str]]:
    """The config and no faults, or None and the faults."""
    try:
        return load_config(Run, source, list(overrides)), ()
    except ConfigError as error:
        return None, error.faults


@given(st.text("ab1 #:&*!|>%@`'\"{}[],?-.=~é$", min_size=1, max_size=8).map(str.strip))
def test_whatever_an_overrides_text_is_it_arrives_whole_or_is_refused_and_quoted_it_always_arrives(write, text):
    assume(text and "${" not in text)  # which OmegaConf replaces by another setting
    source = write(MINIMAL)
    arrived, faults = loaded(source, f"data.prompt={text}")
    if faults:
        assert len(faults) == 1
        assert faults[0].startswith(f"command line: data.prompt={text}: ")
    else:
        assert arrived.data.prompt == text or (text[0] in "'\"" and arrived.data.prompt == text[1:-1])
    assert load_config(Run, source, [f"data.prompt={json.dumps(text)}"]).data.prompt == text


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=5), v, max_size=2))


@given(st.sampled_from(["seed", "data", "training", "adapter", "other"]), VALUES)
def test_whatever_a_file_holds_it_is_a_config_or_its_faults(write, key, value):
    config, faults = loaded(write(yaml.safe_dump({**yaml.safe_load(MINIMAL), key: value}, allow_unicode=True)))
    assert isinstance(config, Run) or faults
    assert all("\n" not in fault for fault in faults)


@pytest.mark.parametrize(
    "override", ["adapter=null", "adapter=3", "adapter.method=[a]", "adapter.method={a: 1}", "adapter=[1]"]
)
@pytest.mark.parametrize("task", [DreamBoothConfig, ControllableConfig])
def test_a_section_that_depends_on_a_key_may_get_any_value(task, override):
    with pytest.raises(ConfigError) as caught:
        load_config(task, f"{task.__module__.split('.')[-1].removesuffix('_config')}/ether_plus", [override])
    (fault,) = caught.value.faults
    assert fault.startswith(f"command line: {override}: ")


def test_an_override_without_a_value_is_null(write):
    source = write(MINIMAL + "training: {learning_rate: 0.1}\n")
    assert load_config(Run, source, ["training.learning_rate="]).training.learning_rate is None


def test_an_equals_sign_may_occur_in_the_value(write):
    assert load_config(Run, write(MINIMAL), ["data.prompt=a=b"]).data.prompt == "a=b"


def test_interpolates(write):
    source = write(MINIMAL + "  prompt: a photo of ${.class_name} ${seed}\nseed: 3\n")
    assert load_config(Run, source, ["data.class_name=cat"]).data.prompt == "a photo of cat 3"


def test_anchors_and_merges(write):
    text = "x: &x {instance_dir: p, class_name: dog}\n"
    source = write(text + "data:\n  <<: *x\n  class_name: 4\n")
    assert faults(source) == [
        "run.yaml:1: x: unknown key. Allowed: data, adapter, training, seed, scale",
        "run.yaml:4: data.class_name: expected text, got 4. Quotes make it text.",
    ]


def test_all_faults_at_once_in_order_with_their_places(write):
    source = write(MINIMAL + "training:\n  stepz: 5\n  betas: [0.9, x]\nscale: big\n")
    assert faults(source, "training.steps=abc", "sed=1") == [
        "run.yaml:5: training.stepz: unknown key. Did you mean 'steps'? Allowed: steps, learning_rate, betas, warm_up, "
        "clip, prior, extra, precision, shuffle, names, blocks",
        "run.yaml:6: training.betas[1]: expected a number, got 'x'",
        "run.yaml:7: scale: expected a number, got 'big'",
        "command line: training.steps=abc: expected a whole number >= 1, got 'abc'",
        "command line: sed=1: unknown key. Did you mean 'seed'? Allowed: data, adapter, training, seed, scale",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=0", "expected a whole number >= 1, got 0"),
        ("training.steps=2.0", "expected a whole number >= 1, got 2.0"),
        ("training.steps='2'", "expected a whole number >= 1, got '2'"),
        ("training.steps=true", "expected a whole number >= 1, got true"),
        ("training.steps=", "expected a whole number >= 1, got null"),
        ("training.learning_rate=-1", "expected a number > 0 or null, got -1"),
        ("training.betas=[1]", "expected a list of 2, each a number, got [1]"),
        ("training.betas=[1, 2, 3]", "expected a list of 2, each a number, got [1, 2, 3]"),
        ("training.betas=1", "expected a list of 2, each a number, got 1"),
        ("training.warm_up=soon", "expected 'auto' or a whole number, got 'soon'"),
        ("training.warm_up={a: 1}", "expected 'auto' or a whole number, got a section"),
        ("training.clip=0", "expected a number > 0 or null, got 0"),
        ("training.prior={method: lroa}", "expected one of 'ether', 'ether_plus', 'lora', got 'lroa'. Did you mean"),
        (
            "training.prior={method: lora, rank: 0}",
            "training.prior.rank: expected a whole number >= 1 and <= 64, got 0",
        ),
        ("training.extra={rank: 0}", "training.extra.rank: expected a whole number >= 1 and <= 64, got 0"),
        ("training.extra=3", "expected a section of `key: value` lines or text, got 3"),
        ("training.precision=fp61", "expected one of 'fp32', 'fp16', got 'fp61'. Did you mean 'fp16'?"),
        ("training.shuffle=maybe", "expected true or false, got 'maybe'"),
        ("training.names=[a, b, c]", "at most 2 names"),
        ("training.names=a", "expected a list, each text, got 'a'"),
        ("training.names=[no]", "expected text, got false. Quotes make it text."),
        ("training.blocks={a: x}", "expected a whole number, got 'x'"),
        ("training=", "expected a section of `key: value` lines, got null. Leave the key out to take the defaults."),
        ("training=3", "expected a section of `key: value` lines, got 3"),
        ("data.instance_dir=3", "expected a path, got 3"),
        (
            "adapter={method: ether, rank: 8}",
            "adapter.rank: unknown key; adapter.method=ether has no rank; it belongs to adapter.method=lora",
        ),
        ("adapter={method: ether, num_blocks: 0}", "expected a whole number >= 1, got 0"),
        (
            "adapter.method=etherplus",
            "expected one of 'ether', 'ether_plus', 'lora', got 'etherplus'. Did you mean 'ether_plus'?",
        ),
        ("steps=3", "unknown key; here it is training.steps"),
        ("seed.x=3", "expected a whole number, got a section"),
        ("seed", "expected section.key=value"),
        ("=3", "expected a key such as section.key before the '='"),
        ("training..steps=3", "expected a key such as section.key before the '='"),
        ("training.names=[a", "not valid YAML: "),
        ("training.names[4]=x", "expected a list, each text, got a section"),
        ("seed=${sede}", "cannot be resolved: Interpolation key 'sede' not found"),
        ("seed=${seed}", "cannot be resolved: Recursive interpolation detected"),
        ("training=${data", "no viable alternative at input '${data'"),
    ],
)
def test_one_line_for_a_bad_override(write, override, message):
    (fault,) = faults(write(MINIMAL), override)
    assert fault.startswith("command line: ")
    assert message in fault


def test_unknown_key_inside_the_chosen_method(write):
    source = write(MINIMAL + "adapter:\n  method: lora\n  rnak: 8\n  rank: 99\n")
    assert faults(source) == [
        "run.yaml:6: adapter.rnak: unknown key. Did you mean 'rank'? Allowed: method, rank",
        "run.yaml:7: adapter.rank: expected a whole number >= 1 and <= 64, got 99",
    ]


def test_a_method_must_be_named_when_the_section_is_there(write):
    expected = "run.yaml:4: adapter.method: missing: expected one of 'ether', 'ether_plus', 'lora'"
    assert faults(write(MINIMAL + "adapter:\n  rank: 8\n")) == [expected]


def test_missing_keys_are_reported_with_the_file(write):
    assert faults(write("data:\n  class_name: dog\n")) == ["run.yaml:1: data.instance_dir: missing: expected a path"]
    assert faults(write("seed: 1\n")) == [
        "run.yaml: data: missing section; it needs data.instance_dir, data.class_name"
    ]
    assert faults(write("# nothing yet\n")) == [
        "run.yaml: data: missing section; it needs data.instance_dir, data.class_name"
    ]


def test_a_mandatory_value_must_be_given(write):
    source = write("data:\n  instance_dir: ???\n  class_name: dog\n")
    assert faults(source) == ["run.yaml:2: data.instance_dir: required: write it there or give data.instance_dir=..."]
    assert load_config(Run, source, ["data.instance_dir=x"]).data.instance_dir == Path("x")


def test_flags_of_other_programs_get_a_hint(write):
    renamed = {
        "max_train_steps": "training.steps",
        "instance_data_dir": "data.instance_dir",
        "tf32": "not needed: bf16",
    }
    source = write(MINIMAL + "training:\n  max_train_steps: 400\n")
    flags = ("--max-train-steps=7", "--max_train_steps", "instance_data_dir=x", "--nonsense=1", "--tf32", "tf32=1")
    assert faults(source, *flags, renamed=renamed) == [
        "run.yaml:5: training.max_train_steps: unknown key; here it is training.steps",
        "command line: --max-train-steps=7: unknown option; here it is training.steps=7",
        "command line: --max_train_steps: unknown option; here it is training.steps",
        "command line: instance_data_dir=x: unknown key; here it is data.instance_dir",
        "command line: --nonsense=1: unknown option",
        "command line: --tf32: unknown option; not needed: bf16",
        "command line: tf32=1: unknown key; not needed: bf16",
    ]


def test_an_interpolated_value_names_both_lines(write):
    source = write(MINIMAL + "training:\n  steps: ${seed}\nseed: -3\n")
    assert faults(source) == [
        "run.yaml:5: training.steps: expected a whole number >= 1, got -3 (from ${seed}, run.yaml:6)"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "run.yaml:2: seed: this key is given twice in its section"),
        ("data: {\n", "run.yaml:2: not valid YAML: expected the node content, but found '<stream end>'"),
        ("seed: 1\n\tscale: 2\n", "run.yaml:2: not valid YAML: a tab; indent with spaces"),
        ("- a\n- b\n", "run.yaml:1: expected `key: value` lines at the top level"),
        ("just text\n", "run.yaml:1: expected `key: value` lines at the top level"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: not valid YAML: but found another document"),
        ("seed: *nowhere\n", "run.yaml:1: not valid YAML: found undefined alias 'nowhere'"),
        ("seed: !!python/object/apply:os.getcwd []\n", "run.yaml:1: not valid YAML: could not determine a constructor"),
        ("seed: a\x00b\n", "run.yaml: not a text file (it holds NUL bytes)"),
    ],
)
def test_broken_files(write, text, message):
    (fault,) = faults(write(text))
    assert fault.startswith(message)


def test_a_file_that_is_not_text(write):
    source = write("")
    Path(source).write_bytes(b"\xff\xd8\xff\xe0 a photo")
    assert faults(source) == ["run.yaml: not UTF-8 text (line 1)"]


def test_a_folder_is_not_a_config(tmp_path):
    assert faults(str(tmp_path)) == [f"{tmp_path}: expected a YAML file, got a folder"]


def test_finds_shipped_configs_by_name_with_and_without_suffix(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # away from the checkout, whose own configs would be found as files
    shipped = tmp_path / "quickstart" / "dreambooth.yaml"
    shipped.parent.mkdir()
    shipped.write_text(MINIMAL)
    monkeypatch.setattr(config_module, "_shipped_folder", lambda: tmp_path)
    for name in ["quickstart/dreambooth", "quickstart/dreambooth.yaml", "configs/quickstart/dreambooth.yaml"]:
        assert find_config(name) == shipped
    with pytest.raises(ConfigError) as caught:
        find_config("quickstrat/dreambooth")
    assert str(caught.value) == (
        "no config 'quickstrat/dreambooth': neither a file nor the name of a shipped config. "
        "Did you mean 'quickstart/dreambooth'? Shipped: quickstart/dreambooth"
    )


def test_a_file_takes_precedence_over_a_shipped_name(write):
    write(MINIMAL)
    assert find_config("run.yaml") == Path("run.yaml")


def test_config_errors_are_user_errors():
    assert issubclass(ConfigError, UserError)


def test_settings_are_frozen_and_closed():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Training().steps = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(pydantic.ValidationError, match="extra"):
        Training(stepz=3)  # pyright: ignore[reportCallIssue]


TRICKY = [
    "",
    "1e-4",
    "0x1f",
    "no",
    "null",
    "~",
    "a: b",
    "- x",
    "${seed}",
    r"\${seed}",
    "tab\there",
    "two\nlines",
    "#",
    "é",
]


@pytest.mark.parametrize("text", [*TRICKY, "1:30", "2024-01-01", ".inf", "'", '"', " padded ", "*a", "%", "[", "= 3"])
def test_text_round_trips(write, text):
    run = Run(data=Data(instance_dir=Path(text or "."), class_name=text, prompt="a photo of " + text))
    assert load_config(Run, write(to_yaml(run))) == run


def test_settings_round_trip_and_numbers_stay_numbers(write):
    training = Training(
        learning_rate=6e-5, betas=(0.0, 1e22), names=["a"], blocks={"down.0": 2}, precision=Precision.HALF
    )
    run = Run(
        data=Data(instance_dir=Path("a/b"), class_name="dog"), adapter=LowRank(rank=2), training=training, scale=1e-300
    )
    text = to_yaml(run)
    assert load_config(Run, write(text)) == run
    plain = yaml.safe_load(text)
    assert plain["training"]["learning_rate"] == 6e-5
    assert plain["scale"] == 1e-300
    assert plain["training"]["betas"] == [0.0, 1e22]
    assert plain["data"]["instance_dir"] == "a/b"


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
@pytest.mark.parametrize("key", ["scale", "training.learning_rate", "training.clip"])
def test_numbers_are_finite(write, key, value):
    (fault,) = faults(write(MINIMAL), f"{key}={value}")
    assert fault.startswith(f"command line: {key}={value}: expected ")


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    class Places(Settings):
        folder: Path
        other: Path | None = None
        text: str = "~/as it is"

    file = tmp_path / "places.yaml"
    file.write_text("folder: ~/photos\nother: ~/other\n")
    places = load_config(Places, file)
    assert (places.folder, places.other, places.text) == (tmp_path / "photos", tmp_path / "other", "~/as it is")
    with pytest.raises(ConfigError, match=r"folder=~nobody-of-this-name.x: .*home directory"):
        load_config(Places, file, ["folder=~nobody-of-this-name/x"])


def test_a_precision_of_no_needs_no_quotes(tmp_path: Path) -> None:
    """YAML reads an unquoted no as false."""
    given = load_config(DreamBoothConfig, "quickstart/dreambooth", ["training.mixed_precision=no"])
    file = tmp_path / "mine.yaml"
    file.write_text(to_yaml(given).replace("mixed_precision: 'no'", "mixed_precision: no"))
    assert "mixed_precision: no\n" in file.read_text()
    assert [config.training.mixed_precision for config in (given, load_config(DreamBoothConfig, file))] == ["no", "no"]
