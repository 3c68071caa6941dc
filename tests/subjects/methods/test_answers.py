import math
from types import SimpleNamespace

import pytest
import torch

from lethescope.subjects.methods.answers import (
    answer_ids,
    answer_log_probs,
    kl,
    nll,
    predicting,
    summed_log_prob,
    token_log_probs,
)
from lethescope.tokens import Encoded, collate


@pytest.fixture
def batch():
    return collate([Encoded((1, 5, 6, 7), 2), Encoded((1, 8, 9), 2), Encoded((1, 3, 4, 5, 6, 2), 3)], 0)


@pytest.fixture
def model():
    logits = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(0)) * 3
    return lambda **_: SimpleNamespace(logits=logits)


def slow(model, batch):
    """Loop over rows and tokens; the sum of each row and the number of answer tokens."""
    logits, rows, count = model().logits, [], 0
    for i in range(len(logits)):
        total = 0.0
        for t in range(1, logits.shape[1]):
            if batch.answer_mask[i, t]:
                scores = logits[i, t - 1].exp()
                total += (scores[batch.input_ids[i, t]] / scores.sum()).log().item()
                count += 1
        rows.append(total)
    return rows, count


def test_sums_and_mean_agree_with_a_loop(model, batch):
    rows, count = slow(model, batch)
    assert count == 2 + 1 + 3
    assert summed_log_prob(model, batch).tolist() == pytest.approx(rows, rel=1e-5)
    assert nll(model, batch).item() == pytest.approx(-sum(rows) / count, rel=1e-5)


def test_nothing_but_answer_tokens_counts(model, batch):
    found = token_log_probs(model, batch)
    assert found.shape == (3, 5)
    assert torch.equal(found != 0, batch.answer_mask[:, 1:])


def test_rows_and_tokens_of_answers_come_in_one_order(model, batch):
    expected = [(i, t) for i in range(3) for t in range(1, 6) if batch.answer_mask[i, t]]
    assert answer_ids(batch).tolist() == [batch.input_ids[i, t].item() for i, t in expected] == [6, 7, 9, 5, 6, 2]
    rows = predicting(model().logits.bfloat16(), batch)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, torch.stack([model().logits[i, t - 1].bfloat16().float() for i, t in expected]))
    found = answer_log_probs(model, batch)
    assert torch.equal(found, token_log_probs(model, batch)[batch.answer_mask[:, 1:]])


def test_prompt_logits_get_no_gradient(batch):
    logits = torch.zeros(3, 6, 11, requires_grad=True)
    nll(lambda **_: SimpleNamespace(logits=logits), batch).backward()
    touched = logits.grad.abs().sum(-1) > 0
    assert torch.equal(touched[:, :-1], batch.answer_mask[:, 1:]) and not touched[:, -1].any()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_agrees_with_a_loop_and_is_zero_between_equals(model, batch, temperature):
    logits = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(1))
    terms = []
    for i, t in batch.answer_mask.nonzero().tolist():
        p, q = ((z[i, t - 1].double() / temperature).softmax(-1).tolist() for z in (model().logits, logits))
        terms.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    found = kl(model, lambda **_: SimpleNamespace(logits=logits), batch, temperature=temperature)
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert kl(model, model, batch, temperature=temperature).item() == pytest.approx(0.0, abs=1e-6)


def test_kl_gives_no_gradient_to_prompts_nor_to_the_teacher(model, batch):
    now, aim = (torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in (2, 3))
    kl(lambda **_: SimpleNamespace(logits=aim), lambda **_: SimpleNamespace(logits=now), batch).backward()
    touched = now.grad.abs().sum(-1) > 0
    assert torch.equal(touched[:, :-1], batch.answer_mask[:, 1:]) and not touched[:, -1].any()
    assert aim.grad is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_sums(toy, side):
    from lethescope.tokens import encode

    encoded = [encode(toy.tokenizer, f.paraphrases[-1], f.answer) for f in toy.facts[:8]]
    single = [summed_log_prob(toy.model, collate([e], 0)).item() for e in encoded]
    assert summed_log_prob(toy.model, collate(encoded, 0, side=side)).tolist() == pytest.approx(single, abs=1e-4)
