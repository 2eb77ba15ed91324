"""Published weights: failed loads are one line, and files of `torch.save` are read without running code."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from ether_diffusion.errors import UserError
from ether_diffusion.weight_files import is_hub_name, loading, read_checkpoint


class Code:
    """Runs a function when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_only_plain_tensors_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "step": 3}, tmp_path / "plain.pt")
    assert read_checkpoint(tmp_path / "plain.pt")["step"] == 3
    torch.save({"a": Code(tmp_path / "ran")}, tmp_path / "code.pt")
    with pytest.raises(pickle.UnpicklingError):
        read_checkpoint(tmp_path / "code.pt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "page.pt").write_text("<html>")
    with pytest.raises(ValueError, match=r"it is not what torch\.save writes"):
        read_checkpoint(tmp_path / "page.pt")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "w.pt"), "w.pt: Permission denied. Check the permissions"),
        (OSError("two\nlines."), "two lines. Get it"),
        (LocalEntryNotFoundError("a page of text"), "it is not in the local cache, and cannot be downloaded. Get it"),
        (KeyError(), "KeyError. Get it"),
    ],
)
def test_a_failed_load_is_one_line(error: Exception, reason: str) -> None:
    with pytest.raises(UserError) as caught, loading("DINO: cannot load 'x'", "Get it here."):
        raise error
    assert str(caught.value).startswith(f"DINO: cannot load 'x': {reason}")
    assert "\n" not in str(caught.value)


def test_an_error_for_the_user_passes_unchanged() -> None:
    with pytest.raises(UserError, match=r"^as it was$"), loading("DINO", "Get it here."):
        raise UserError("as it was")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("user/repo", True), ("repo", False), ("a/b/c", False), ("./repo", False), ("/repo", False), ("~/repo", False),
     ("../repo", False), ("user/", False)],
)  # fmt: skip
def test_names_of_the_hub(name: str, expected: bool) -> None:
    assert is_hub_name(name) is expected
