"""An export is tied to the base that the adapter was trained on, and to an adapter that does something."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import ether_diffusion
from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.base_digest import base_digest
from ether_diffusion.adapters.certificate import CERTIFICATE
from ether_diffusion.errors import Notice, UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion_cli import main
from support.adapted_unets import move, settings_of
from support.narrow_base import narrow_base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, and others that differ in one weight of a part."""
    root = tmp_path_factory.mktemp("bases")
    for name in ("base", "other_unet", "other_text"):
        pipeline: Any = narrow_base()
        with torch.no_grad():
            if name == "other_unet":
                pipeline.unet.conv_in.weight[0, 0, 0, 0] += 0.1
            if name == "other_text":
                pipeline.text_encoder.get_input_embeddings().weight[0, 0] += 0.1
        pipeline.save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of UNet and text encoder."""
    base, settings = load_base(str(bases["base"])), settings_of("ether_plus")
    for part, own in ((base.unet, settings), (base.text_encoder, settings.for_text_encoder())):
        attach(part, own)
        move(part, 0.1)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    return ether_diffusion.save_adapter(
        base.unet, folder, base_model=str(bases["base"]), text_encoder=base.text_encoder
    )


@pytest.mark.parametrize("other", ["other_unet", "other_text"])
@pytest.mark.parametrize("format", ["kohya", "merged"])
def test_another_base_is_refused_unless_it_is_forced(
    other: str, format: str, bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "dog.safetensors" if format == "kohya" else tmp_path / "dog"
    with pytest.raises(UserError, match=rf"--base \S+{other} has other weights than \S+, on which .*: --force-base$"):
        ether_diffusion.export(adapter, format, output, base_model=str(bases[other]))
    assert not any(tmp_path.iterdir())
    ether_diffusion.export(adapter, format, output, base_model=str(bases[other]), force_base=True)
    assert output.exists()


def test_the_same_weights_elsewhere_are_the_same_base(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    narrow_base().save_pretrained(tmp_path / "copy")
    output = tmp_path / "dog.safetensors"
    ether_diffusion.export(adapter, "kohya", output, base_model=str(tmp_path / "copy"))
    with safe_open(output, "pt") as file:
        assert file.metadata()["ether_diffusion.base_digest"] == base_digest(load_base(str(bases["base"])).unet)


def test_inspect_says_whether_a_base_is_the_same(
    bases: dict[str, Path], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dog.safetensors"
    ether_diffusion.export(adapter, "kohya", file)
    for made, base, answer in (
        (adapter, "base", "equal to the base that it was made for"),
        (adapter, "other_unet", "other weights than the base that it was made for"),
        (file, "base", "equal to the base that it was made for"),
        (file, "other_unet", "other weights than the base that it was made for"),
    ):
        assert main(["inspect", str(made), "--base", str(bases[base])]) == 0
        assert f"{bases[base]}: {answer}" in capsys.readouterr().out
    assert main(["inspect", str(adapter)]) == 0
    printed = capsys.readouterr().out
    assert "certificate " in printed
    assert str(base_digest(load_base(str(bases["base"])).unet)) in printed


def test_an_adapter_without_a_certificate_is_exported_unchecked(
    bases: dict[str, Path], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of an earlier version, or of PEFT."""
    plain = Path(shutil.copytree(adapter, tmp_path / "plain"))
    (plain / CERTIFICATE).unlink()
    ether_diffusion.export(plain, "kohya", tmp_path / "dog.safetensors", base_model=str(bases["other_unet"]))
    assert main(["inspect", str(plain), "--base", str(bases["base"])]) == 0
    assert "cannot be compared with the base that it was made for" in capsys.readouterr().out


def test_a_marked_adapter_is_refused_in_every_format(bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(str(bases["base"]))
    attach(base.unet, settings_of("ether_plus"))  # it starts at the base
    with pytest.warns(Notice):
        marked = ether_diffusion.save_adapter(base.unet, tmp_path / "marked", base_model=str(bases["base"]))
    for format, output in (("kohya", "a.safetensors"), ("diffusers", "b"), ("peft", "c"), ("merged", "d")):
        with pytest.raises(UserError, match=r"is not certified: effect: .*: --uncertified$"):
            ether_diffusion.export(marked, format, tmp_path / output)
        assert not (tmp_path / output).exists()
    done = ether_diffusion.export(marked, "kohya", tmp_path / "a.safetensors", uncertified=True)
    assert [note for note in done.notes if "nothing" in note]
