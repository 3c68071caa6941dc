"""What the tests of curvature share: a model that knows some sequences by heart."""

import runpy
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def memorised():
    """A trained model and what it learned by heart (`tests/memorised.py`); half a minute to train, so once."""
    made = runpy.run_path(str(Path(__file__).parents[2] / "memorised.py"))
    return made["memorised_model"]()
