"""Tests of the scoring kernel against a textbook twin: one plain forward a candidate, one loop over its tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors

from lethescope.errors import InputError
from lethescope.hooks import capturing
from lethescope.models import Model
from lethescope.scoring import candidates, mean_over_answer, score_tokens, tails, target_log_probs
from lethescope.subjects.tokenizer import fact_tokenizer
from lethescope.tokens import Encoded, collate

KINDS = ("llama", "gpt2", "neox")


def textbook(model: Model, e: Encoded) -> tuple[list[float], list[bool]]:
    """Log-probability of each answer token, and whether it is the first choice, from one plain forward."""
    with torch.no_grad():
        logits = model.module(torch.tensor([e.ids])).logits[0]
    log_probs, first = [], []
    for at in range(e.start, len(e.ids)):
        spread = logits[at - 1].double()
        log_probs.append(float(spread[e.ids[at]] - torch.log(torch.exp(spread).sum())))
        first.append(int(spread.argmax()) == e.ids[at])
    return log_probs, first


def random_sequences(seed: int, n: int = 40, vocabulary: int = 49) -> list[Encoded]:
    """Sequences of mixed lengths: shared prompts, and prompts of one token, whose tail is all there is."""
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(1, vocabulary, size).tolist()) for size in (1, 1, 2, 3, 5, 5, 9)]
    out = []
    for _ in range(n):
        prompt = prompts[rng.integers(len(prompts))]
        answer = tuple(rng.integers(1, vocabulary, rng.integers(1, 5)).tolist())
        out.append(Encoded(prompt + answer, len(prompt)))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_equals_its_slow_twin(make_model: Any, kind: str) -> None:
    model, encoded = make_model(kind), random_sequences(0)
    log_probs, right = score_tokens(model, encoded)
    for e, found, first in zip(encoded, log_probs, right, strict=True):
        wanted, greedy = textbook(model, e)
        n = len(e.answer)
        np.testing.assert_allclose(found[:n], wanted, rtol=0, atol=1e-4)
        assert first[:n].tolist() == greedy
        assert np.isnan(found[n:]).all() and not first[n:].any()
    assert 0 < right.sum() < right.size


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_kernel_equals_one_padded_batch(make_model: Any, side: Any) -> None:
    model, encoded = make_model(), random_sequences(1)
    log_probs, _ = score_tokens(model, encoded)
    batch = collate(encoded, 0, side=side)
    with torch.no_grad():
        logits = model.module(**batch.inputs()).logits[:, :-1]
    found = target_log_probs(logits, batch.input_ids[:, 1:])
    for row, e in enumerate(encoded):
        wanted = found[row][batch.answer_mask[row, 1:]].numpy()
        np.testing.assert_allclose(log_probs[row, : len(e.answer)], wanted, rtol=0, atol=1e-4)


def test_prompts_of_one_word_without_a_bos(make_model: Any, some_facts: Any) -> None:
    bare = fact_tokenizer(some_facts)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    model = Model(make_model().module, bare)
    short = [f.model_copy(update={"prompt": f.prompt.split()[0]}) for f in some_facts[:6]]
    asked = candidates(bare, [*short, *some_facts[6:9]])
    assert [e.start for e in asked.encoded[:3]] == [1, 1, 1]
    log_probs, _ = score_tokens(model, asked.encoded)
    wanted = [np.mean(textbook(model, e)[0]) for e in asked.encoded]
    np.testing.assert_allclose(np.nanmean(log_probs, 1), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 256])
def test_batches_hold_every_answer_once_and_candidates_together(make_model: Any, rows: int) -> None:
    model, encoded = make_model(), random_sequences(2)
    seen, prompts = [], []
    for batch in tails(model, encoded, rows=rows):
        seen += batch.rows
        prompts += [{encoded[row].prefix for row in batch.rows}]
        for row, log_p, mask in zip(batch.rows, batch.log_probs(batch.run(model)), batch.mask, strict=True):
            np.testing.assert_allclose(log_p[mask], textbook(model, encoded[row])[0], rtol=0, atol=1e-4)
    assert sorted(seen) == list(range(len(encoded)))
    assert all(not a & b for i, a in enumerate(prompts) for b in prompts[:i])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_prompt_is_not_used_up(make_model: Any, kind: str) -> None:
    model = make_model(kind)
    with torch.no_grad():
        for batch in tails(model, random_sequences(3), rows=8):
            first = batch.run(model)
            with capturing(model.blocks, stop=True):
                batch.run(model)  # a pass that is cut off must not leave half of its keys behind
            torch.testing.assert_close(batch.run(model), first, rtol=0, atol=0)


def test_a_tail_that_begins_another_is_run_with_it(make_model: Any) -> None:
    prompt = (5, 6, 7)
    encoded = [Encoded(prompt + answer, 3) for answer in ((8,), (9, 10), (9, 11, 12), (13,), (9, 11))]
    model = make_model()
    (batch,) = tails(model, encoded)
    # the tails are 7 | 7 9 | 7 9 11 | 7 | 7 9: all begin the third
    assert batch.lead == [2] and batch.owner.tolist() == [0] * 5
    for row, log_p, mask in zip(batch.rows, batch.log_probs(batch.run(model)), batch.mask, strict=True):
        np.testing.assert_allclose(log_p[mask], textbook(model, encoded[row])[0], rtol=0, atol=1e-4)
    (parted,) = tails(model, encoded, apart="aabab")
    assert parted.lead == [1, 2] and parted.owner.tolist() == [0, 0, 1, 0, 1]


def test_target_log_probs_are_those_of_float32(make_model: Any) -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 6, 3], [1, 1, 1]])
    wanted = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(target_log_probs(logits, targets), wanted)
    assert target_log_probs(logits.half(), targets).dtype == torch.float32


def test_means_leave_padding_out() -> None:
    values = torch.tensor([[1.0, 3.0, 100.0], [2.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert mean_over_answer(values, mask).tolist() == [2.0, 2.0]


def test_candidates_are_laid_out_by_fact(words: Any, some_facts: Any) -> None:
    facts = [some_facts[0], some_facts[1].model_copy(update={"paraphrases": (), "alternatives": ("surgeon",)})]
    asked = candidates(words, facts)
    assert asked.shape == (2, 4)
    said = [words.decode(e.answer) for e in asked.encoded]
    assert said == [facts[0].answer, *facts[0].alternatives, facts[1].answer, "surgeon"]
    table = asked.table(np.arange(6.0))
    np.testing.assert_array_equal(table, [[0, 1, 2, 3], [4, 5, np.nan, np.nan]])
    assert asked.table(np.zeros((6, 2))).shape == (2, 4, 2)
    assert candidates(words, facts, prompt=2).fact.tolist() == [0, 0, 0, 0]
    assert candidates(words, facts, most=1).candidate.tolist() == [0, 1, 0, 1]


def test_a_bad_answer_is_told_with_its_fact(words: Any, some_facts: Any) -> None:
    bad = some_facts[0].model_copy(update={"alternatives": ("Atlantis",)})
    with pytest.raises(InputError, match="fact 'forget-0-birthplace': the answer 'Atlantis'"):
        candidates(words, [bad])
