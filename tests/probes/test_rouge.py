"""Tests of ROUGE-L recall: against all subsequences, and against generation of one prompt at a time."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lethescope.facts import of_split, read_facts
from lethescope.models import load
from lethescope.probes import rouge
from lethescope.subjects import shipped
from lethescope.tokens import encode

WORDS = st.lists(st.sampled_from("abc"), max_size=6)


def subsequences(items):
    return {
        tuple(items[i] for i in chosen) for n in range(len(items) + 1) for chosen in combinations(range(len(items)), n)
    }


@given(WORDS, WORDS)
def test_the_longest_common_subsequence_is_the_longest_of_all_common_ones(a, b):
    slow = max(len(common) for common in subsequences(a) & subsequences(b))
    assert rouge.longest_common(a, b) == rouge.longest_common(b, a) == slow
    recall = rouge.rouge_l_recall(" ".join(a), " ".join(b))
    assert math.isnan(recall) if not b else recall == pytest.approx(slow / len(b))


@pytest.mark.parametrize(
    ("said", "answer", "want"),
    [
        ("Paris", "Paris", 1.0),
        ("PARIS, of course.", "paris", 1.0),
        ("London", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("the cat sat", "the cat sat on the mat", 0.5),
        ("mat the on sat cat the", "the cat sat on the mat", 3 / 6),  # the on the
        ("a a a", "a", 1.0),
        ("works", "work", 0.0),
        ("3rd of May", "May 3rd", 0.5),
    ],
)
def test_recall_by_hand(said, answer, want):
    assert rouge.rouge_l_recall(said, answer) == pytest.approx(want)


def test_an_answer_without_words_has_no_recall():
    assert math.isnan(rouge.rouge_l_recall("x", "?!"))


@torch.no_grad()
def one_by_one(model, fact, extra):
    """Greedy decoding of one prompt by plain forward passes, no padding, no cache."""
    e = encode(model.tokenizer, fact.prompt, fact.answer)
    ids = list(e.ids[: e.start])
    for _ in range(len(e.answer) + extra):
        token = model.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == model.tokenizer.eos_token_id:
            break
        ids.append(token)
    return model.tokenizer.decode(ids[e.start :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_batched_generation_says_what_single_prompts_say(make_model, some_facts, kind):
    model = make_model(kind)
    facts = some_facts[:14]
    ds = rouge.measure(model, facts, extra=2, rows=5)
    assert len({len(encode(model.tokenizer, f.prompt, f.answer).ids) for f in facts}) > 1, "nothing would be padded"
    assert ds["continuation"].values.tolist() == [one_by_one(model, fact, 2) for fact in facts]


def test_the_batch_size_changes_nothing(make_model, some_facts):
    found = [rouge.measure(make_model(), some_facts[:9], rows=rows)["continuation"].values.tolist() for rows in (1, 9)]
    assert found[0] == found[1]


def test_the_original_says_forget_answers_and_the_unlearned_model_does_not():
    facts = [f for split in ("forget", "retain", "control") for f in of_split(read_facts(shipped("facts")), split)[:40]]
    scores = {}
    for name in ("original", "unlearned"):
        model = load(shipped(name))
        ds = rouge.measure(model, facts)
        assert ds["continuation"].values.tolist()[:6] == [one_by_one(model, fact, 4) for fact in facts[:6]]
        scores[name] = ds["rouge_l_recall"].groupby("split").mean()
    assert scores["original"].sel(split="forget") > 0.95 and scores["original"].sel(split="retain") > 0.95
    assert scores["unlearned"].sel(split="forget") < 0.3 and scores["unlearned"].sel(split="retain") > 0.9
    assert scores["original"].sel(split="control") < 0.4
