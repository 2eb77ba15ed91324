"""What the tests of bad inputs and of crashes share: the process that forks, and what is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from robustness.case import Case, World
from robustness.forked import Server
from robustness.world import make_world
from support.sharing import made_once, session_folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(session_folder(tmp_path_factory) / "server")
    yield server
    server.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, finished_run: Path, server: Server) -> World:
    def make(folder: Path) -> None:
        def run(*command: str) -> None:
            place = folder / "while_made"
            for name in ("work", "home", "cache", "tmp"):
                (place / name).mkdir(parents=True, exist_ok=True)
            code, _, errors = server.run(Case("world", command), place, {})
            assert code == 0, errors

        folder.mkdir()
        make_world(folder, run)

    folder = made_once(tmp_path_factory, "bad_inputs", make)
    return {"RUN": finished_run, **{path.name.upper(): path for path in folder.iterdir() if path.name.islower()}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The case's own working directory, home, caches and temporary files."""
    folder = tmp_path / "case"
    for name in ("work", "home", "cache", "tmp"):
        (folder / name).mkdir(parents=True)
    return folder
