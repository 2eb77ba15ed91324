"""Every test of the tuners starts from the same seed."""

import pytest


@pytest.fixture(autouse=True)
def _seeded(seeded: None) -> None:
    pass
