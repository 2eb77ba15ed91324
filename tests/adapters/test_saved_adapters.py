"""Saved adapters: PEFT folders that PEFT can load, and that are loaded strictly here."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ether_diffusion
from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.certificate import CERTIFICATE
from ether_diffusion.adapters.loading import load_adapter
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import load_base
from support.adapted_unets import inputs, moved_unet, sample
from support.unets import one_block_unet

WEIGHTS = "adapter_model.safetensors"


def of_the_miniature(method: str, folder: Path) -> Path:
    """A saved adapter that fits the base that it names."""
    unet = load_base("tiny").unet
    attach(unet, METHODS[method]())
    return save_adapter(unet, folder, base_model="tiny", notes={"instance prompt": "a photo of qwe toy"})


@pytest.fixture(params=["ether", "ether_plus", "lora"])  # all of them: test_every_method.py
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Tensor]:
    """A saved adapter, and its model's output."""
    unet = moved_unet(request.param)
    return save_adapter(unet, tmp_path / "adapter", base_model="tiny"), sample(unet)


def test_round_trip(saved: tuple[Path, Tensor]) -> None:
    unet = one_block_unet()
    found = load_adapter(unet, saved[0])
    assert torch.equal(sample(unet), saved[1])
    assert found.base_model == "tiny"
    assert len(found.digest) == 64


def test_plain_peft_loads_it(saved: tuple[Path, Tensor]) -> None:
    model = PeftModel.from_pretrained(one_block_unet(), str(saved[0]))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        assert torch.equal(model(*inputs()).sample, saved[1])


def test_what_peft_saves_we_load(tmp_path: Path) -> None:
    config = ether_diffusion.EtherConfig(target_modules=["to_q", "to_v"], init_weights=False)
    from peft import get_peft_model

    model = get_peft_model(one_block_unet(), config)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(str(tmp_path / "peft"))
    unet = one_block_unet()
    load_adapter(unet, tmp_path / "peft")
    assert torch.equal(sample(unet), sample(model.base_model.model))  # pyright: ignore


def test_equal_adapters_make_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_adapter(moved_unet("ether_plus"), tmp_path / name, base_model="tiny")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("method", ["ether_plus", "lora"])
def test_model_card_says_how_to_load(tmp_path: Path, method: str) -> None:
    folder = of_the_miniature(method, tmp_path / "adapter")
    card = (folder / "README.md").read_text()
    assert "base_model: tiny" in card
    assert "| instance prompt | a photo of qwe toy |" in card
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(folder))
    assert ("import ether_diffusion  #" in code) == ("method | ETHER" in card)  # PEFT knows LoRA by itself
    scope: dict[str, object] = {}
    exec(code, scope)
    assert isinstance(scope["pipeline"].unet, PeftModel)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_save_replaces_the_whole_folder(saved: tuple[Path, Tensor]) -> None:
    (saved[0] / "left_over.txt").write_text("old")
    save_adapter(moved_unet("ether"), saved[0], base_model="tiny")
    assert sorted(path.name for path in saved[0].iterdir()) == [
        "README.md",
        "adapter_config.json",
        WEIGHTS,
        CERTIFICATE,
    ]
    assert [path.name for path in saved[0].parent.iterdir()] == [saved[0].name]


def test_the_method_is_registered_by_the_import_alone(saved: tuple[Path, Tensor]) -> None:
    config = PeftConfig.from_pretrained(str(saved[0]))
    assert config.peft_type in ("ETHER", "LORA")


def edit(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    for key, value in changes.items():
        name = {"first": min(tensors), "extra": "base_model.model.conv_in.ether_in.u"}[key]
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": None}, "1 missing, e.g. down_blocks"),
        ({"extra": torch.zeros(1, 4)}, "1 left over, e.g. conv_in.ether_in.u"),
        ({"first": torch.zeros(3, 5)}, r"1 of another shape, .* is \(3, 5\) in the file"),
        ({"first": torch.full((1, 16), float("nan"))}, "hold NaN or infinity"),
    ],
)
def test_a_tensor_that_does_not_fit_is_an_error_and_the_model_stays_as_it_was(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    folder = save_adapter(moved_unet("ether_plus"), tmp_path / "adapter", base_model="tiny")
    edit(folder, **change)
    unet = one_block_unet()
    before = sample(unet)
    with pytest.raises(UserError, match=message):
        load_adapter(unet, folder)
    assert torch.equal(sample(unet), before)
    assert not hasattr(unet, "peft_config")


def test_another_base_is_an_error_that_names_the_right_one(tmp_path: Path) -> None:
    folder = of_the_miniature("ether_plus", tmp_path / "adapter")
    with pytest.raises(UserError, match=r"does not fit this UNet2DConditionModel.*It was trained on tiny\."):
        load_adapter(one_block_unet(), folder)


def test_broken_folders_are_refused_in_one_line_each(tmp_path: Path) -> None:
    folder = save_adapter(moved_unet("ether"), tmp_path / "adapter", base_model="tiny")

    def broken(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    (broken("no_weights") / WEIGHTS).unlink()
    (broken("cut") / WEIGHTS).write_bytes(b"cut short")
    config = json.loads((folder / "adapter_config.json").read_text())
    (broken("unknown") / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "ETHR"}))
    for name, message in (
        ("no_weights", "is missing"),
        ("cut", "cannot be read"),
        ("unknown", "unknown method 'ETHR'; known: .*ETHER"),
        ("nowhere", "is not a folder; expected a run folder"),
    ):
        with pytest.raises(UserError, match=message):
            read_adapter(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no adapter_config\.json"):
        read_adapter(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "eter"}, r"cannot be read: .*'eter'"),
        ({"num_blocks": 0}, r"cannot be read: .*num_blocks.*0"),
        ({"peft_type": ["ETHER"]}, r"cannot be read: |unknown method \['ETHER'\]"),
        ([1], r"expected a JSON object, got \[1\]\."),
        (b"{", r"cannot be read: Expecting"),
        ("{}".encode("utf-16"), r"cannot be read: 'utf-8' codec"),
    ],
)
def test_a_malformed_config_is_refused_in_one_line_with_its_path(tmp_path: Path, change: Any, message: str) -> None:
    folder = save_adapter(moved_unet("ether"), tmp_path / "adapter", base_model="tiny")
    file = folder / "adapter_config.json"
    if isinstance(change, dict):
        change = {**json.loads(file.read_text()), **change}
    file.write_bytes(change if isinstance(change, bytes) else json.dumps(change).encode())
    with pytest.raises(UserError, match=rf"adapter_config\.json: {message}") as caught:
        read_adapter(folder)
    assert "\n" not in str(caught.value)


def test_runs_and_checkpoints_are_found(finished_run: Path) -> None:
    assert read_adapter(finished_run).folder == finished_run / "adapter"
    checkpoint = finished_run / "checkpoints/step-000002"
    assert read_adapter(checkpoint).folder == checkpoint / "adapter"


def test_saving_an_adapter_that_is_not_there_is_refused_and_the_folder_stays(saved: tuple[Path, Tensor]) -> None:
    folder, _ = saved
    written = (folder / WEIGHTS).read_bytes()
    unet = one_block_unet()
    with pytest.raises(UserError, match="no adapter 'default' to save; there is: none"):
        save_adapter(unet, folder, base_model="tiny")
    attach(unet, METHODS["ether"](), seed=0)
    with pytest.raises(UserError, match="no adapter 'mine' to save; there is: 'default'"):
        save_adapter(unet, folder, base_model="tiny", name="mine")
    assert (folder / WEIGHTS).read_bytes() == written


@pytest.mark.parametrize("method", ["ether_plus", "lora", "vera"])
def test_an_adapter_of_the_same_name_is_replaced_even_on_other_layers(method: str, tmp_path: Path) -> None:
    for target in ("to_q", "to_v"):
        unet = one_block_unet()
        attach(unet, METHODS[method](target=[target]), seed=0)
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1
        save_adapter(unet, tmp_path / target, base_model="tiny")
    alone = one_block_unet()
    load_adapter(alone, tmp_path / "to_v")
    for before in [["one"], ["one", "two"]][: 1 if method == "vera" else 2]:  # PEFT puts one VeRA on a layer
        several = one_block_unet()
        for name in before:
            load_adapter(several, tmp_path / "to_q", name)
        load_adapter(several, tmp_path / "to_v", "one")
        assert sorted(several.peft_config) == before  # pyright: ignore[reportArgumentType]
        assert torch.equal(sample(several), sample(alone))
        several.set_adapter(before[-1])
        assert torch.equal(sample(several), sample(alone)) == (before == ["one"])


def test_any_module_can_be_loaded_into(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    x, trained = torch.randn(3, 8), network()
    attach(trained, METHODS["ether"](target=["0"]), seed=1)
    save_adapter(trained, tmp_path / "adapter", base_model="a network")
    loaded = network()
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(loaded(x), trained(x))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("lora", {"lora_alpha": 8}),
        ("lora", {"use_rslora": True}),
        ("ether_plus", {"num_blocks": 2}),
        ("oft", {"coft": True}),
    ],
)
def test_other_settings_with_the_same_weights_are_another_adapter(
    tmp_path: Path, method: str, change: dict[str, Any]
) -> None:
    folder = save_adapter(moved_unet(method), tmp_path / "adapter", base_model="tiny")
    before = read_adapter(folder)
    edit_config(folder, **change)
    after = read_adapter(folder)
    assert after.digest != before.digest
    assert after.weights_digest == before.weights_digest == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def test_what_does_not_change_an_adapters_function_does_not_change_its_digest(tmp_path: Path) -> None:
    folder = save_adapter(moved_unet("lora"), tmp_path / "adapter", base_model="tiny")
    before = read_adapter(folder).digest
    edit_config(
        folder,
        base_model_name_or_path="elsewhere/base",
        revision="main",
        peft_version="99.0",
        inference_mode=False,
        auto_mapping={"base_model_class": "UNet"},
        target_modules=["to_v", "to_q", "to_out.0", "to_k"],
    )
    assert read_adapter(folder).digest == before
    assert read_adapter(Path(shutil.copytree(folder, tmp_path / "copy"))).digest == before


def test_the_text_encoders_part_is_read_with_the_adapter_and_in_its_digest(tmp_path: Path) -> None:
    encoder = load_base("tiny").text_encoder
    attach(encoder, METHODS["lora"]().for_text_encoder())
    folder = save_adapter(moved_unet("lora"), tmp_path / "adapter", base_model="tiny", text_encoder=encoder)
    saved = read_adapter(folder)
    assert saved.text_part.folder == folder / "text_encoder"
    files = [folder / WEIGHTS, folder / "text_encoder" / WEIGHTS]
    assert saved.weights_digest == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    edit_config(folder / "text_encoder", lora_alpha=8)
    assert read_adapter(folder).digest != saved.digest
    alone = Path(shutil.copytree(folder / "text_encoder", tmp_path / "alone"))
    assert load_adapter(load_base("tiny").text_encoder, alone).tensors.keys() == saved.text_part.tensors.keys()
    with pytest.raises(UserError, match=r"holds no text_encoder/; expected a run of adapter\.text_encoder=true"):
        load_adapter(load_base("tiny").text_encoder, read_adapter(alone), text_encoder=True)
