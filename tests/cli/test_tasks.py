"""The table of tasks: a task that is registered is one that `train` knows."""

from __future__ import annotations

import pytest

from ether_diffusion_cli import main, tasks


def test_a_registered_task_is_in_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tasks, "TASKS", known := dict(tasks.TASKS))
    monkeypatch.setattr("ether_diffusion_cli.train.TASKS", known)
    tasks.register_task("toy", "noise -> less noise", "a_module_that_is_not_imported_by_help", "toy/config")
    for arguments, shown in ((["train", "--help"], "noise -> less noise"), (["train", "toy", "--help"], "toy/config")):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        assert shown in capsys.readouterr().out


def test_two_modules_cannot_have_one_tasks_name() -> None:
    before = dict(tasks.TASKS)
    entry = before["dreambooth"]
    tasks.register_task(entry.name, entry.summary, entry.module, entry.example)
    with pytest.raises(ValueError, match=r"task 'dreambooth': ether_diffusion\.training\.dreambooth has this name"):
        tasks.register_task("dreambooth", "another", "elsewhere")
    assert before == tasks.TASKS
