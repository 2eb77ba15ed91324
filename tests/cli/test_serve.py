"""`ether-diffusion serve`: what it refuses before it serves."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ether_diffusion_cli import main
from support.optional import needs

needs("fastapi")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapters", "nothing"], "nothing: no such folder."),
        (["--capacity", "4"], "serve: --capacity 4 is below --batch-size 8"),
        (["--batch-size", "5000"], "serve: --batch-size 5000: Input should be less than or equal to 1024."),
        (["--max-body", "3"], "serve: --max-body 3: Input should be greater than or equal to 1024."),
        (["--device", "abacus"], "expected cpu, cuda, mps or xpu"),
        (["--max-size", "72"], "--max-size: 72 is not a multiple of"),
        (["--max-size", "512"], "--max-size: 512, but the base 'tiny' generates 64 x 64 pixels"),
        (["--port", "70000"], "expected a whole number from 0 to 65,535"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1 --port "),
    ],
)
def test_what_it_refuses(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--adapters", str(tmp_path), "--device", "cpu", "--port", "0", *options]
    try:
        code = main(["serve", "--base", "tiny", *given])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_known_before_the_base_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "--base", "no/such-base", "--adapters", str(tmp_path), "--port", str(port)]) == 2
    assert f"--host 127.0.0.1 --port {port}: cannot listen there: Address already in use" in capsys.readouterr().err


def test_an_empty_key_is_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ETHER_DIFFUSION_API_KEY", "")
    assert main(["serve", "--base", "tiny", "--adapters", str(tmp_path), "--port", "0"]) == 2
    assert "ETHER_DIFFUSION_API_KEY: expected printable ASCII characters" in capsys.readouterr().err
