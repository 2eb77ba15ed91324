"""Every test of the tuners draws from the same seed, on one thread."""

import pytest


@pytest.fixture(autouse=True)
def _alike(one_thread: None, seeded: None) -> None:
    pass
