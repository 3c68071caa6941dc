"""What the tests of several probes share."""

import pytest

from lethescope.facts import read_facts
from lethescope.models import load
from lethescope.probes import landscape
from lethescope.subjects import shipped


@pytest.fixture(scope="session")
def landscapes():
    """Landscapes of the shipped models: one fact on each of 32 forget and 32 control people, all four relations."""
    facts = [f for f in read_facts(shipped("facts")) if f.split != "retain"][::5]
    models = {name: load(shipped(name)) for name in ("original", "unlearned", "reference")}
    options = {"original": models["original"], "k": 5, "sizes": (0.3,)}
    return {name: landscape.measure(model, facts, **options) for name, model in models.items()}
