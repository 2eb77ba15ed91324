"""Numbers and names that options cannot take are one line with exit code 2, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from ether_diffusion_cli import main

PERTURBATION, COST = ("analyze", "perturbation"), ("analyze", "cost")
BAD: list[tuple[tuple[str, ...], str]] = [
    *(((*PERTURBATION, "--distances", "1", value), f"{value}: expected a number") for value in ("nan", "inf", "1e9")),
    *(((*PERTURBATION, "--guidance", value), f"{value}: expected a number") for value in ("nan", "inf", "1e400", "x")),
    *(((*PERTURBATION, f"--{name}", "0"), "0: expected a whole") for name in ("count", "draws", "num-blocks", "steps")),
    ((*PERTURBATION, "--count", "10000000000"), "expected a whole number from 1 to 1,000,000"),
    ((*PERTURBATION, "--batch-size", "-1"), "-1: expected a whole number"),
    ((*PERTURBATION, "--device", "abacus"), "device 'abacus'"),
    ((*PERTURBATION, "--target", "no_such_layer"), "no_such_layer"),
    ((*PERTURBATION, "--num-blocks", "7"), "do not divide into 7"),
    ((*COST, "--tokens", "0"), "0: expected a whole number"),
    ((*COST, "--tokens", "99999999999"), "expected a whole number from 1 to 1,000,000"),
    ((*COST, "--latents", "12"), "--latents 12: expected a multiple of 8"),
    ((*COST, "--latents", "80000"), "--latents 80000: expected a multiple of 8, at most 4,096"),
    ((*COST, "phii"), "'phii': no such model. Did you mean 'phi'?"),
    (("analyze", "energy", "RUN", "--chunk", "0"), "0: expected a whole number"),
    (("analyze", "energy", "RUN", "--device", "abacus"), "device 'abacus'"),
    (("analyze", "geometry", "RUN", "--device", "cuda:99"), "device 'cuda:99'"),
    (("evaluate", "RUN", "--num-images", "0"), "0: expected a whole number"),
    (("evaluate", "RUN", "--num-images", "1e3"), "1e3: expected a whole number"),
    (("evaluate", "RUN", "--seed", "x"), "x: expected a whole number from -9,223"),
    (("evaluate", "RUN", "--split", "validation"), "--split validation: a run of a subject has no splits"),
    (("score", "RUN", "--batch-size", "0"), "0: expected a whole number"),
    (("score", "RUN", "--device", "abacus"), "device 'abacus'"),
    (("score", "RUN", "--scorer", "clip"), "--scorer clip: expected NAME=SOURCE"),
    (("score", "RUN", "--scorer", "=x"), "--scorer : the protocol has no such scorer"),
    (("score", "RUN", "--scorer", "clop=x"), "--scorer clop: the protocol has no such scorer. Did you mean 'clip'?"),
    (("score", "RUN", "--scorer", "clip=x"), "--scorer clip=x: the miniature's own scorers have the package's weights"),
    (("score", "RUN", "--protocol", "tinyworld/dreambooth-v"), "Did you mean 'tinyworld/dreambooth-v"),
    (("compare", "RUN"), "results.json: no such file"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_options_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(finished_run.rglob("*"))
    try:
        code = main([str(finished_run) if word == "RUN" else word for word in arguments])
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
    assert sorted(finished_run.rglob("*")) == before
