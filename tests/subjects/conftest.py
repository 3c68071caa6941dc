import copy
from types import SimpleNamespace

import pytest
import torch

from lethescope.subjects.people import people
from lethescope.subjects.tiny import tiny_llama, train
from lethescope.subjects.tokenizer import fact_tokenizer


@pytest.fixture(scope="session")
def _toy():
    facts = people(seed=3, forget=2, retain=4, control=2)
    tokenizer = fact_tokenizer(facts)
    return SimpleNamespace(
        facts=facts, tokenizer=tokenizer, model=tiny_llama(len(tokenizer), 0, layers=2, width=48, heads=2, kv_heads=1)
    )


@pytest.fixture
def toy(_toy):
    """A handful of facts, their tokenizer, and an untrained two-layer Llama of one's own."""
    return SimpleNamespace(facts=_toy.facts, tokenizer=_toy.tokenizer, model=copy.deepcopy(_toy.model))


@pytest.fixture(scope="session")
def _taught(_toy):
    model = copy.deepcopy(_toy.model)
    texts = [f"{form} {fact.answer}." for fact in _toy.facts for form in (fact.prompt, *fact.paraphrases)]
    with torch.random.fork_rng(devices=[]):
        train(model, _toy.tokenizer, texts, epochs=60, lr=1e-2, batch_size=32, depth_drop=0, progress=False)
    return model


@pytest.fixture
def taught(toy, _taught):
    """The same, but the model knows every fact by heart."""
    toy.model = copy.deepcopy(_taught)
    return toy
