"""Tests of repeated sampling: against exact chances, and of what a sample depends on."""

import numpy as np
import pytest
import torch

from lethescope.analyses import sampling
from lethescope.analyses.sampling import sampled
from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.subjects.handmade import handmade, lookup_facts
from lethescope.tokens import encode


@pytest.fixture(scope="module")
def probabilities(make_model, some_facts):
    """A model, likely answers of one and of two words, and the chance of each at temperature 0.5, by hand."""
    model, facts, chances = make_model("gpt2"), [], []
    with torch.no_grad():
        for i, fact in enumerate(some_facts[:6]):
            said = fact.prompt
            for _ in range(1 + i % 2):
                logits = model.module(input_ids=torch.tensor([model.tokenizer(said)["input_ids"]])).logits[0, -1]
                logits[:4] = -torch.inf  # special tokens
                said += " " + model.tokenizer.decode(logits.argmax())
            fact = fact.model_copy(update={"answer": said.removeprefix(fact.prompt + " ")})
            facts.append(fact)
            e = encode(model.tokenizer, fact.prompt, fact.answer)
            log_p = (model.module(input_ids=torch.tensor([e.ids])).logits[0] / 0.5).log_softmax(-1)
            chances.append(np.exp(sum(log_p[i - 1, e.ids[i]].item() for i in range(e.start, len(e.ids)))))
    return model, facts, np.array(chances)


def test_samples_are_right_as_often_as_the_answer_is_likely(probabilities):
    model, facts, chances = probabilities
    assert chances.min() > 0.01
    assert chances.max() > 0.2
    ds = sampled(model, facts, n=2000, temperature=0.5, seed=0, spare=0, rows=4000)
    spread = np.sqrt(chances * (1 - chances) / 2000)
    assert (np.abs(ds["right"].mean("sample") - chances) < 4 * spread + 1e-3).all()
    np.testing.assert_array_equal(ds["recovered"], ds["right"].any("sample"))


def test_a_facts_samples_depend_on_its_seed_and_nothing_else(probabilities):
    model, facts, _ = probabilities
    many = sampled(model, facts, n=5, temperature=1.0, seed=0)
    for other in (
        sampled(model, facts, n=5, temperature=1.0, seed=0, rows=1),
        sampled(model, facts[::-1], n=5, temperature=1.0, seed=0).isel(fact=slice(None, None, -1)),
        sampled(model, facts[2:3], n=5, temperature=1.0, seed=0),
    ):
        same = many["text"].sel(fact=other["fact"]).values == other["text"].values
        assert same.all()
    assert (sampled(model, facts, n=5, temperature=1.0, seed=1)["text"].values != many["text"].values).any()
    assert (many.attrs["n"], many.attrs["temperature"], many.attrs["seed"]) == (5, 1.0, 0)


def test_a_cold_model_gives_its_first_choice(probabilities):
    model, facts, _ = probabilities
    ds = sampled(model, facts, n=2, temperature=1e-4, seed=0, spare=0)
    for i, fact in enumerate(facts):
        e = encode(model.tokenizer, fact.prompt, fact.answer)
        out = model.module.generate(
            torch.tensor([e.ids[: e.start]]),
            do_sample=False,
            max_new_tokens=len(e.answer),
            min_new_tokens=len(e.answer),
        )
        ids = out[0, e.start :].tolist()
        ids = ids[: ids.index(2)] if 2 in ids else ids
        assert set(ds["text"].values[i]) == {model.tokenizer.decode(ids)}


def test_guesses_are_the_null():
    made = handmade(lookup_facts(8, 4, 4))
    forget = of_split(made.facts, "forget")
    warm = sampled(made.never_taught, forget, n=40, temperature=1e6, seed=0, spare=0)  # every word is as likely
    size = len(made.never_taught.tokenizer)
    assert warm["null"].mean() == pytest.approx(1 - (1 - 1 / size) ** 40, abs=0.15)
    cold = sampled(made.original, forget, n=3, temperature=0.05, seed=0)
    assert cold["recovered"].all()
    assert (cold["null"] == 0).all()
    assert not sampled(made.unlearned, forget, n=3, temperature=0.05, seed=0)["recovered"].any()


def test_a_text_begins_with_an_answer_by_whole_words():
    for text, answer, want in (
        (" Paris, France", "paris", True),
        ("Parisian", "Paris", False),
        ("St . John ' s", "St. John's", True),
        ("the Paris", "Paris", False),
        ("東京です", "東京", True),
        ("", "Paris", False),
    ):
        assert sampling._begins(text, answer) is want


@pytest.mark.parametrize(("n", "temperature"), [(0, 1.0), (2, 0.0), (2, -1.0), (2, float("nan"))])
def test_bad_input_is_told_in_one_line(n, temperature):
    made = handmade()
    with pytest.raises(InputError, match="give n >= 1, temperature > 0"):
        sampled(made.original, made.facts[:1], n=n, temperature=temperature, seed=0)
