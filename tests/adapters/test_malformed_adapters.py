"""Adapter folders that are malformed but can be parsed: one line with the file's path, and an unchanged model."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from ether_diffusion import EtherConfig, load_adapter, save_adapter
from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.saved_adapter import CONFIG, WEIGHTS, find_adapter, read_adapter
from ether_diffusion.adapters.targets import check_targets
from ether_diffusion.errors import UserError
from ether_diffusion.model_card import model_card
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.saved_modules import UNET, find_whole_module, save_whole_module
from support.adapted_unets import ADAPTERS, moved_unet, sample
from support.unets import one_block_unet


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved adapter of each method."""
    root = tmp_path_factory.mktemp("adapters")
    return {method: save_adapter(moved_unet(method), root / method, base_model="tiny") for method in ADAPTERS}


def changed(folder: Path, to: Path, **values: Any) -> Path:
    """A copy with other values in its config; ... takes a value out."""
    copy = Path(shutil.copytree(folder, to))
    config = {**json.loads((copy / CONFIG).read_text()), **values}
    (copy / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return copy


def refused(folder: Path) -> str:
    """The one line that loading the folder ends in; the model is unchanged."""
    unet = one_block_unet()
    names, output = list(unet.state_dict()), sample(unet)
    with pytest.raises(UserError) as caught:
        load_adapter(unet, folder)
    assert list(unet.state_dict()) == names
    assert torch.equal(sample(unet), output)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("target_modules", 5, r"target_modules is 5; expected text or a list of texts\."),
        ("target_modules", [1, "to_q"], "target_modules is"),
        ("target_modules", {"to_q": 1}, "target_modules is"),
        ("exclude_modules", True, "exclude_modules is True"),
        ("modules_to_save", "conv_out", r"modules_to_save is 'conv_out'; expected a list of texts\."),
        ("base_model_name_or_path", ["tiny"], "base_model_name_or_path is"),
        ("revision", 3, "revision is 3; expected text"),
        ("target_modules", "(to_q", "PEFT cannot use these settings"),
        ("target_modules", None, "PEFT cannot use these settings|does not fit"),
        ("target_modules", ..., "PEFT cannot use these settings|does not fit"),
        ("target_modules", "to_q", "does not fit this UNet2DConditionModel"),
        ("peft_type", 7, "unknown method 7"),
        ("peft_type", ..., "unknown method None"),
    ],
)
@pytest.mark.parametrize("method", ["ether_plus", "lora"])
def test_a_wrong_value_is_one_line(
    folders: dict[str, Path], method: str, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    assert re.search(message, refused(changed(folders[method], tmp_path / "changed", **{key: value})))


def test_a_setting_of_a_later_version_is_not_dropped(folders: dict[str, Path], tmp_path: Path) -> None:
    later = refused(changed(folders["ether_plus"], tmp_path / "changed", gates="in"))
    assert later.endswith("unknown setting 'gates'; a later version of ether_diffusion may know it.")


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("ether_plus", {"blocks_pattern": {"(": 2}}),
        ("ether_plus", {"blocks_pattern": [1]}),
        ("ether_plus", {"blocks_pattern": {"to_q": 1e30}}),
        ("ether_plus", {"sides_pattern": {"*": "in"}}),
        ("ether_plus", {"sides_pattern": 5}),
        ("ether_plus", {"num_blocks": 10**30}),
        ("ether_plus", {"num_blocks": "2"}),
        ("ether_plus", {"variant": ["ether"]}),
        ("lora", {"r": "4"}),
        ("lora", {"r": -4}),
        ("lora", {"r": 0}),
        ("lora", {"r": 10**12}),
        ("lora", {"r": 4.5}),
        ("lora", {"rank_pattern": [4]}),
        ("lora", {"rank_pattern": {"(": 4}}),
        ("lora", {"lora_alpha": "x"}),
        ("lora", {"lora_dropout": "much"}),
        ("lora", {"init_lora_weights": "nonsense"}),
        ("oft", {"r": 0, "oft_block_size": 0}),
        ("oft", {"r": 7}),
        ("boft", {"boft_block_num": "a"}),
        ("hra", {"r": None}),
        ("vera", {"r": 10**9}),
        ("vera", {"projection_prng_key": "x"}),
        ("delora", {"r": [1]}),
        ("naive", {"num_blocks": {}}),
    ],
)
def test_settings_that_a_method_cannot_use_are_one_line(
    folders: dict[str, Path], method: str, values: dict[str, Any], tmp_path: Path
) -> None:
    refused(changed(folders[method], tmp_path / "changed", **values))


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
@pytest.mark.parametrize("method", ["ether", "lora", "vera"])
def test_tensors_that_are_no_numbers_of_an_adapter_are_refused(
    folders: dict[str, Path], method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folders[method], tmp_path / "copy"))
    tensors = load_file(copy / WEIGHTS)
    key = sorted(tensors)[1]
    save_file({**tensors, key: torch.ones(tensors[key].shape).to(dtype)}, copy / WEIGHTS)
    found = str(dtype).removeprefix("torch.")
    message = refused(copy)
    assert message.startswith(f"{copy / WEIGHTS}: {key} is {found}; an adapter's tensors are float64, float32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_tensors_of_another_precision_are_loaded(folders: dict[str, Path], dtype: torch.dtype, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders["ether_plus"], tmp_path / "copy"))
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(copy / WEIGHTS).items()}
    save_file(tensors, copy / WEIGHTS)
    unet = one_block_unet()
    load_adapter(unet, copy)
    own = {key.replace(".default", ""): value for key, value in unet.state_dict().items()}
    assert all(torch.equal(own[key.removeprefix("base_model.model.")], value.float()) for key, value in tensors.items())


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("ether_plus", {"variant": "ether"}, "settings of ETHER, but .* has ETHER\\+'s tensors"),
        ("ether", {"variant": "ether_plus"}, "settings of ETHER\\+, but .* lacks ETHER\\+'s tensors"),
        ("lora", {"use_dora": True}, "settings of DoRA, but .* lacks DoRA's tensors"),
        ("dora", {"use_dora": False}, "settings of LoRA, but .* has DoRA's tensors"),
    ],
)
def test_settings_of_another_method_than_the_tensors_are_refused_when_they_are_read(
    folders: dict[str, Path], method: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_adapter(changed(folders[method], tmp_path / "changed", **values))


def test_a_config_nested_too_deeply_is_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders["ether"], tmp_path / "copy"))
    (copy / CONFIG).write_text("[" * 100_000)
    assert CONFIG in refused(copy)


def test_a_run_whose_adapter_lacks_its_config_is_not_replaced_by_its_checkpoint(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(folders["ether"], tmp_path / "run/checkpoints/step-000002/adapter")
    assert find_adapter(tmp_path / "run") == checkpoint  # an unfinished run
    shutil.copytree(folders["ether"], tmp_path / "run/adapter")
    (tmp_path / "run/adapter" / CONFIG).unlink()
    with pytest.raises(UserError, match=r"run/adapter/adapter_config\.json is missing"):
        read_adapter(tmp_path / "run")


@pytest.mark.parametrize("method", ["lora", "dora", "hra", "vera", "delora"])
def test_an_absurd_rank_is_refused(method: str) -> None:
    with pytest.raises(ValidationError, match="less than or equal to 4096"):
        METHODS[method].model_validate({"rank": 100_000_000})


@pytest.mark.parametrize("content", ["5", "[]", '{"vae": 5}', '{"vae": ["x"]}', "{", "\xff"])
def test_a_malformed_vae_record_is_one_line(folders: dict[str, Path], content: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders["ether"], tmp_path / "copy"))
    (copy / "vae.json").write_text(content, encoding="latin-1")
    assert "vae.json" in refused(copy)


def accepted(folder: Path, read: Callable[[Path], Any]) -> bool:
    """Whether a folder can be read; if not, in one line with its path."""
    try:
        read(folder)
    except UserError as error:
        message = str(error)
    else:
        return True
    assert str(folder) in message
    assert "\n" not in message
    return False


VALUES = [None, True, -1, 0, 3, 10**18, 2.5, float("nan"), "", "(", "to_q", [], [None], ["to_q", "["], {}, {"(": "("}]


@pytest.mark.parametrize("changes", [10, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ADAPTERS)
def test_whatever_a_config_holds_is_loaded_or_refused_in_one_line(
    folders: dict[str, Path], method: str, changes: int, tmp_path: Path
) -> None:
    """Seeded random changes of one or two values: a line that names the folder, or an adapter of the right tensors."""
    draw = random.Random(method)
    keys = sorted(json.loads((folders[method] / CONFIG).read_text()))
    names = list(one_block_unet().state_dict())
    for k in range(changes):
        values = {draw.choice(keys): draw.choice(VALUES) for _ in range(draw.randint(1, 2))}
        folder, unet = changed(folders[method], tmp_path / str(k), **values), one_block_unet()
        if not accepted(folder, lambda folder: load_adapter(unet, folder)):  # noqa: B023 - called at once
            assert list(unet.state_dict()) == names, values
        shutil.rmtree(folder)


EDITS = st.lists(st.tuples(st.integers(0, 600), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4)


@given(st.sampled_from([CONFIG, WEIGHTS]), EDITS)
def test_whatever_bytes_a_folder_holds_it_is_read_or_refused_in_one_line(
    folders: dict[str, Path], tmp_path: Path, name: str, edits: list[tuple[int, int, bytes]]
) -> None:
    folder = Path(shutil.copytree(folders["ether"], tmp_path / "changed", dirs_exist_ok=True))
    content = bytearray((folder / name).read_bytes())
    for place, length, new in edits:
        content[place : place + length] = new
    (folder / name).write_bytes(content)
    accepted(folder, read_adapter)


@pytest.mark.parametrize("field", ["target", "blocks_pattern", "sides_pattern"])
def test_a_bad_regular_expression_in_the_settings_is_one_line(field: str) -> None:
    values = {"target": "(to_q", "blocks_pattern": {"(to_q": 2}, "sides_pattern": {"(to_q": "in"}}
    with pytest.raises(ValidationError, match=r"'\(to_q' is not a regular expression: missing \)"):
        METHODS["ether_plus"](**{field: values[field]})
    METHODS["ether_plus"](target=["(to_q"])  # a name, not an expression
    with pytest.raises(UserError, match=r"adapter\.target: '\(to_q' is not a regular expression"):
        check_targets(one_block_unet(), EtherConfig(target_modules="(to_q"), "(to_q")


@pytest.mark.parametrize(
    "index",
    [
        {"unet": 5},
        {"unet": ["diffusers"]},
        {"unet": ["os", "system"]},
        {"unet": [None, None]},
        {"vae": ["diffusers", "NoSuchClass"]},
        {"text_encoder": {"a": 1}},
        {"scheduler": ["diffusers", "UNet2DConditionModel"]},
        {"_class_name": ["StableDiffusionPipeline"]},
        {"tokenizer": [[], []]},
    ],
)
def test_a_model_index_with_wrong_values_is_one_line(index: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(Path(load_base.__code__.co_filename).parents[1] / "tinyworld/weights/pipeline", folder)
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **index}))
    with pytest.raises(UserError, match=r"^base_model: ") as caught:
        load_base(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


BASES = [
    "tiny",
    "user/repo",
    "a: b",
    "- x",
    "no",
    "1e3",
    "null",
    "#5",
    "'q",
    '"',
    "a\nb",
    "C:\\new\\base",
    "é 🐶",
    "|x|",
]
BASES += ["x: [", "@at", "%p", "{a}", "*s", "&r", "!t", "\x7f", "\u2028", " lead", "caf\udce9"]


@pytest.mark.parametrize("base", BASES, ids=ascii)
def test_the_front_matter_is_yaml_for_every_name_of_a_base(base: str, tmp_path: Path) -> None:
    adapter = save_adapter(moved_unet("ether"), tmp_path / "adapter", base_model=base)
    module = save_whole_module(one_block_unet(), tmp_path / "unet", UNET, base_model=base)
    for folder in (adapter, module):
        card = (folder / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["base_model"] == base
        assert front["tags"][-1] == "stable-diffusion"
        compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    assert read_adapter(adapter).base_model == base
    found = find_whole_module(module, UNET)
    assert found is not None
    assert found.base_model == base


def test_values_cannot_break_the_table_of_a_card() -> None:
    card = model_card("T", "tiny", "peft", {"prompt": "a | b\nc"}, "pass")
    assert "| prompt | a \\| b c |\n" in card


def test_the_reprs_of_what_we_return_are_short(tmp_path: Path) -> None:
    base = load_base("tiny")
    attach(base.unet, METHODS["ether_plus"]())
    folder = save_adapter(base.unet, tmp_path / "adapter", base_model="tiny")
    saved = load_adapter(load_base("tiny").unet, folder)
    assert repr(saved) == f"SavedAdapter('{folder}': ETHER+, {saved.parameters:,} parameters, base tiny)"
    assert repr(base) == "Base('tiny': 64 pixels, torch.float32)"
    module = save_whole_module(one_block_unet(), tmp_path / "unet", UNET, base_model="tiny")
    assert len(repr(find_whole_module(module, UNET))) < 600
