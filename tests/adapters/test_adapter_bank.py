"""Saved adapters in a bank on a UNet, and on a shelf: images of one batch with an adapter each, as one by one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from ether_diffusion import AdapterBank
from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.loading import load_adapter
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.adapters.shelf import Shelf, add_to_shelf, build_shelf, remove_from_shelf
from ether_diffusion.errors import UserError
from support.adapted_unets import move
from support.unets import one_block_unet, small_unet

NAMES = ["a", "b", "c"]


def saved(folder: Path, method: str = "ether_plus", seed: int = 0, **settings: Any) -> Path:
    """A saved adapter of random vectors."""
    unet = one_block_unet()
    attach(unet, METHODS[method](**settings), seed=seed)
    move(unet, 0.1 * (seed + 1))
    return save_adapter(unet, folder, base_model="a small UNet")


@pytest.fixture(scope="module", params=["ether", "ether_plus"])
def folders(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: saved(root / name, request.param, seed) for seed, name in enumerate(NAMES)}


def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, text = (torch.randn(count, *shape, generator=generator) for shape in ((4, 8, 8), (5, 24)))
    return x, torch.arange(10, 10 + 50 * count, 50), text


def sample(unet: Any, count: int) -> Tensor:
    with torch.no_grad():
        return unet(*inputs(count)).sample


def one_by_one(folders: dict[str, Path], names: Sequence[str | None]) -> Tensor:
    """The samples of a batch, each from a UNet with its adapter alone."""
    outputs = []
    for index, name in enumerate(names):
        unet: Any = one_block_unet()
        if name is not None:
            load_adapter(unet, folders[name])
        with torch.no_grad():
            outputs.append(unet(*(part[index : index + 1] for part in inputs(len(names)))).sample)
    return torch.cat(outputs)


def assert_near(found: Tensor, expected: Tensor) -> None:
    span = (expected.max() - expected.min()).item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * span)


def filled(folders: dict[str, Path], **settings: Any) -> tuple[Any, AdapterBank]:
    unet = one_block_unet()
    bank = AdapterBank(unet, **settings)
    for name, folder in folders.items():
        bank.load(name, folder)
    return unet, bank


def test_images_of_a_batch_take_their_adapters(folders: dict[str, Path]) -> None:
    unet, bank = filled(folders)
    assert bank.names == NAMES
    base = sample(one_block_unet(), 5)
    for names in (["c", None, "a", "b", "a"], ["a"] * 5):
        with bank.select(names):
            assert_near(sample(unet, 5), one_by_one(folders, names))
    with bank.select([None, None]), pytest.raises(ValueError, match="a batch of 5 samples, and 2 names"):
        sample(unet, 5)
    with bank.select([None] * 5):
        assert torch.equal(sample(unet, 5), base)
    assert torch.equal(sample(unet, 5), base)


def test_guidance_takes_the_names_twice(folders: dict[str, Path]) -> None:
    unet, bank = filled(folders)
    with bank.select(["b", None]):
        assert_near(sample(unet, 4), one_by_one(folders, ["b", None, "b", None]))


def test_scales(folders: dict[str, Path]) -> None:
    unet, bank = filled(folders)
    alone: Any = one_block_unet()
    load_adapter(alone, folders["a"])
    alone.set_adapters("default", 0.5)
    half, full = sample(alone, 3), one_by_one(folders, ["a", "a", "a"])
    with bank.select(["a", "a", None], [0.5, 1.0, 0.5]):
        found = sample(unet, 3)
    assert_near(found, torch.stack([half[0], full[1], sample(one_block_unet(), 3)[2]]))


def test_adapters_come_and_go(folders: dict[str, Path]) -> None:
    unet, bank = filled(folders, capacity=3)
    with pytest.raises(UserError, match=r"the bank is full \(capacity=3\)"):
        bank.load("d", folders["a"])
    bank.remove("b")
    bank.load("d", folders["b"])
    bank.load("a", folders["c"])  # replaces
    assert bank.names == ["a", "c", "d"]
    with bank.select(["a", "d", "c"]):
        assert_near(sample(unet, 3), one_by_one(folders, ["c", "b", "c"]))
    with pytest.raises(UserError, match=r"no adapter 'b'.*It holds a, c, d"), bank.select(["b"]):
        pass
    with pytest.raises(UserError, match="no adapter 'b' was loaded"):
        bank.remove("b")
    for names, scales, message in ((["a"], [1.0, 1.0], "2 scales for 1 names"), ([], None, "one name an image")):
        with pytest.raises(UserError, match=message), bank.select(names, scales):  # type: ignore[arg-type]
            pass
    bank.detach()
    assert [name for name, _ in unet.named_modules()] == [name for name, _ in one_block_unet().named_modules()]
    assert bank.names == []


def test_a_compiled_unet_stays_compiled(folders: dict[str, Path]) -> None:
    unet, bank = filled({"a": folders["a"]}, capacity=4)
    torch.compiler.reset()
    counter = CompileCounter()
    unet.compile(backend=counter, fullgraph=True)
    for names in (["a", None], ["b", "a"], ["c", "b"]):
        for name in names:
            if name is not None:
                bank.load(name, folders[name])
        with bank.select(names):
            assert_near(sample(unet, 2), one_by_one(folders, names))
        bank.remove(next(iter(bank.names)))
    assert counter.frame_count == 1


def test_an_adapter_costs_its_file_and_half_in_bf16(folders: dict[str, Path]) -> None:
    _, bank = filled(folders)
    unet, half = filled(folders, dtype=torch.bfloat16)
    tensors = (folders["a"] / "adapter_model.safetensors").stat().st_size
    assert bank.bytes_per_adapter == 2 * half.bytes_per_adapter
    assert 0.2 * tensors < bank.bytes_per_adapter < tensors
    with half.select(NAMES):
        torch.testing.assert_close(sample(unet, 3), one_by_one(folders, [*NAMES]), rtol=0.02, atol=0.02)


OTHERS = {
    "variant: ": ("ether", {"sides": "both"}),
    "sides of ": ("ether_plus", {"sides": "in"}),
    "blocks of ": ("ether_plus", {"num_blocks": 2}),
    "layers: ": ("ether_plus", {"target": ["to_q"]}),
    "a bank is for ETHER and ETHER": ("lora", {}),
}


@pytest.mark.parametrize("message", OTHERS)
def test_adapters_of_another_kind_are_refused(message: str, tmp_path: Path) -> None:
    unet, bank = filled({"a": saved(tmp_path / "a")})
    method, settings = OTHERS[message]
    with pytest.raises(UserError, match=re.escape(message)):
        bank.load("b", saved(tmp_path / "b", method, **settings))
    assert bank.names == ["a"]
    with bank.select(["a"]):
        assert_near(sample(unet, 1), one_by_one({"a": tmp_path / "a"}, ["a"]))


def test_parts_that_a_bank_does_not_hold_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    adapter = saved(run / "adapter")
    unet = one_block_unet()
    bank = AdapterBank(unet)
    for part, message in (("text_encoder", "also trained its text encoder"), ("before", "after another adapter")):
        shutil.copytree(saved(tmp_path / f"for_{part}"), adapter / part)
        with pytest.raises(UserError, match=message):
            bank.load("a", run)
        shutil.rmtree(adapter / part)
    (run / "condition_encoder").mkdir()
    with pytest.raises(UserError, match="a controllable run"):
        bank.load("a", run)
    (run / "condition_encoder").rmdir()
    assert not any("base_layer" in name for name, _ in unet.named_modules())
    bank.load("a", run)
    with pytest.raises(UserError, match="belongs to a bank"):
        load_adapter(unet, run)


def test_models_that_cannot_take_a_bank(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    unet = one_block_unet()
    load_adapter(unet, folder)
    with pytest.raises(UserError, match="carries adapters"):
        AdapterBank(unet).load("a", folder)
    with pytest.raises(UserError, match="does not fit"):
        AdapterBank(small_unet((4, 8))).load("a", folder)
    with pytest.raises(UserError, match="capacity=0"):
        AdapterBank(unet, capacity=0)


def test_projections_with_a_bank_are_not_fused(folders: dict[str, Path]) -> None:
    unet, _ = filled(folders)
    with pytest.raises(ValueError, match="would silently drop"):
        unet.fuse_qkv_projections()


# A shelf


def test_a_shelf_gives_what_the_folders_give(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "adapters.safetensors"
    build_shelf(file, folders)
    unet = one_block_unet()
    bank = AdapterBank.open(file, unet, capacity=2)
    assert bank.names == NAMES
    loaded_unet, loaded = filled(folders)
    for names in (["a", "b"], ["c", None], ["b", "a"], ["a", "c"]):
        with bank.select(names), loaded.select(names):
            assert torch.equal(sample(unet, 2), sample(loaded_unet, 2))
    with pytest.raises(UserError, match=r"3 adapters of .* room for 2"), bank.select(NAMES):
        pass
    assert bank.digest("a") == loaded.digest("a")
    bank.load("own", folders["a"])
    with bank.select(["own", "c"]):
        assert_near(sample(unet, 2), one_by_one(folders, ["a", "c"]))


def test_the_adapter_used_longest_ago_makes_room(tmp_path: Path) -> None:
    folders = {name: saved(tmp_path / name, "ether", seed) for seed, name in enumerate("abcd")}
    build_shelf(tmp_path / "shelf", folders)
    bank = AdapterBank.open(tmp_path / "shelf", one_block_unet(), memory=3 * 4 * Shelf(tmp_path / "shelf").layout.size)
    assert bank.capacity == 3
    for names in (["a"], ["b"], ["c"], ["a"], ["d"]):
        with bank.select(names):
            pass
    assert bank._bank is not None
    assert sorted(bank._bank.rows) == ["a", "c", "d"]
    with pytest.raises(UserError, match="memory=10"):
        AdapterBank.open(tmp_path / "shelf", one_block_unet(), memory=10)


def test_a_shelf_is_changed(tmp_path: Path) -> None:
    folders = {name: saved(tmp_path / name, seed=seed) for seed, name in enumerate("abcde")}
    file = tmp_path / "shelf"
    build_shelf(file, {name: folders[name] for name in "abc"})
    rows = {name: Shelf(file).row(name).clone() for name in "abc"}
    open_before = Shelf(file)
    contents = add_to_shelf(file, {"d": folders["d"], "é": folders["e"]})
    assert list(contents.digests) == ["a", "b", "c", "d", "é"]
    remove_from_shelf(file, ["b"])
    shelf = Shelf(file)
    assert shelf.names == ["a", "c", "d", "é"]
    for name in "ac":
        assert torch.equal(shelf.row(name), rows[name])
    with pytest.raises(UserError, match="holds an adapter 'd' already"):
        add_to_shelf(file, {"d": folders["a"]})
    add_to_shelf(file, {"d": folders["a"]}, replace=True)
    assert torch.equal(Shelf(file).row("d"), rows["a"])
    assert torch.equal(open_before.row("b"), rows["b"])  # who has it open sees what there was
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_a_shelf_refuses(tmp_path: Path) -> None:
    a, other = saved(tmp_path / "a"), saved(tmp_path / "other", num_blocks=2)
    file = tmp_path / "shelf"
    with pytest.raises(UserError, match="no adapters"):
        build_shelf(file, {})
    with pytest.raises(UserError, match="differ in blocks of"):
        build_shelf(file, {"a": a, "other": other})
    with pytest.raises(UserError, match="cannot be a name"):
        build_shelf(file, {"": a})
    assert not file.exists()
    build_shelf(file, {"a": a})
    content = file.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        build_shelf(file, {"a": a})
    unet = one_block_unet()
    attach(unet, METHODS["ether_plus"]())
    elsewhere = save_adapter(unet, tmp_path / "elsewhere", base_model="another UNet")
    for adapters, message in (({"b": other}, "differ in blocks of"), ({"b": elsewhere}, "differ in base_model")):
        with pytest.raises(UserError, match=message):
            add_to_shelf(file, adapters)
    for names, message in ((["b"], "no adapter 'b'"), (["a"], "would be empty")):
        with pytest.raises(UserError, match=message):
            remove_from_shelf(file, names)
    assert file.read_bytes() == content
    weights = a / "adapter_model.safetensors"
    with pytest.raises(UserError, match="is no shelf"):
        add_to_shelf(weights, {"b": a})
    for broken in (content[:100], content[:-8], b""):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(UserError, match="cannot be read as a shelf"):
            Shelf(tmp_path / "broken")
    (tmp_path / "nan").write_bytes(content[:-4] + b"\x00\x00\xc0\x7f")
    with pytest.raises(UserError, match="NaN"):
        Shelf(tmp_path / "nan").row("a")
    with pytest.raises(UserError, match="differ in"):
        AdapterBank.open(file, small_unet((4, 8)))


def test_a_shelf_in_bf16(folders: dict[str, Path], tmp_path: Path) -> None:
    build_shelf(tmp_path / "full", folders)
    build_shelf(tmp_path / "half", folders, dtype=torch.bfloat16)
    full, half = (Shelf(tmp_path / name) for name in ("full", "half"))
    assert torch.equal(half.row("a"), full.row("a").bfloat16())


def test_the_bank_is_the_models_own(folders: dict[str, Path]) -> None:
    unet, bank = filled(folders)
    assert isinstance(unet, nn.Module)
    assert set(unet.state_dict()) != set(one_block_unet().state_dict())  # layers are wrapped, as by every adapter
    assert all("bank" not in key for key in unet.state_dict())
    bank.detach()
    assert set(unet.state_dict()) == set(one_block_unet().state_dict())
