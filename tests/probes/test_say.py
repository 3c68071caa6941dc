"""Tests of channel *say*: against real generation, and over paraphrases that some facts do not have."""

import numpy as np
import pytest
import torch

from lethescope.facts import of_split, read_facts
from lethescope.models import load
from lethescope.probes import say
from lethescope.subjects import shipped
from lethescope.tokens import encode, join

METRICS = ("log_probability", "rank", "greedy", "exact_memorization", "extraction_strength", "truth_ratio")


@pytest.fixture(scope="module")
def uneven(some_facts):
    """Facts with 2, 1 and 0 paraphrases, and 3, 1 and 0 alternatives."""
    cuts = [(2, 3), (1, 1), (0, 0), (2, 0), (0, 3)]
    return [
        f.model_copy(update={"paraphrases": f.paraphrases[:p], "alternatives": f.alternatives[:a]})
        for f, (p, a) in zip(some_facts, cuts, strict=False)
    ]


@torch.no_grad()
def log_probability(model, prompt, answer):
    """One plain forward pass over prompt and answer."""
    e = encode(model.tokenizer, prompt, answer)
    log_p = model.module(input_ids=torch.tensor([e.ids])).logits[0].log_softmax(-1)
    return np.mean([log_p[i - 1, e.ids[i]].item() for i in range(e.start, len(e.ids))])


def decoded_greedily(model, fact, prompt):
    e = encode(model.tokenizer, prompt, fact.answer)
    out = model.module.generate(
        torch.tensor([e.ids[: e.start]]), do_sample=False, max_new_tokens=len(e.answer), min_new_tokens=len(e.answer)
    )
    return tuple(out[0, e.start :].tolist()) == e.answer


def test_greedy_is_what_generation_gives():
    facts = read_facts(shipped("facts"))
    few = [f for split in ("forget", "retain", "control") for f in of_split(facts, split)[:6]]
    found = []
    for name in ("original", "unlearned"):
        model = load(shipped(name))
        greedy = say.measure(model, few)["greedy"]
        for i, fact in enumerate(few):
            for n, prompt in enumerate((fact.prompt, *fact.paraphrases)):
                found.append(decoded_greedily(model, fact, prompt))
                assert greedy[i, n].item() == found[-1], f"{name}: {join(prompt, fact.answer)}"
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_log_probabilities_are_those_of_single_plain_passes(make_model, uneven, kind):
    model = make_model(kind)
    found = say.measure(model, uneven)["log_probability"]
    assert found.dims == ("fact", "prompt", "candidate")
    assert found.shape == (5, 3, 4)
    for i, fact in enumerate(uneven):
        prompts, answers = (fact.prompt, *fact.paraphrases), (fact.answer, *fact.alternatives)
        for n in range(3):
            for k in range(4):
                here = n < len(prompts) and k < len(answers)
                want = log_probability(model, prompts[n], answers[k]) if here else np.nan
                np.testing.assert_allclose(found[i, n, k].item(), want, atol=1e-4)


def test_what_a_fact_does_not_have_is_nan_in_every_metric(make_model, uneven):
    ds = say.measure(make_model(), uneven)
    for name in METRICS:
        there = ds[name].notnull().any("candidate") if "candidate" in ds[name].dims else ds[name].notnull()
        asks = [1 + len(f.paraphrases) for f in uneven]
        if name == "truth_ratio":
            asks = [n if f.alternatives else 0 for n, f in zip(asks, uneven, strict=True)]
        assert there.sum("prompt").values.tolist() == asks, name


def test_a_paraphrase_counts_like_a_prompt_of_its_own(make_model, uneven):
    model = make_model()
    ds = say.measure(model, uneven)
    asked = [f.model_copy(update={"prompt": f.paraphrases[0], "paraphrases": ()}) for f in uneven if f.paraphrases]
    alone = say.measure(model, asked)
    for name in METRICS:
        table = ds[name].sel(fact=alone["fact"]).isel(prompt=1)
        np.testing.assert_allclose(table, alone[name].isel(prompt=0), atol=1e-5)


def test_the_score_is_the_best_over_prompts_for_each_candidate(make_model, uneven):
    ds = say.measure(make_model(), uneven)
    assert ds["place"].values.tolist() == ["best prompt"]
    for i in range(len(uneven)):
        for k in range(4):
            seen = [x for x in ds["log_probability"][i, :, k].values if not np.isnan(x)]
            np.testing.assert_equal(ds["score"][i, k, 0].item(), max(seen, default=np.nan))


def test_rank_counts_the_candidates_that_are_likelier(make_model, uneven):
    ds = say.measure(make_model(), uneven)
    ranks = []
    for i in range(len(uneven)):
        for n in range(1 + len(uneven[i].paraphrases)):
            true, *wrong = ds["log_probability"][i, n].values
            ranks.append(1 + sum(1 for w in wrong if w > true))
            assert ds["rank"][i, n].item() == ranks[-1]
    assert len(set(ranks)) > 1
