import math
from types import SimpleNamespace

import pytest
import torch

from lethescope.subjects.methods import npo
from lethescope.tokens import Encoded, collate

FORGET = collate([Encoded((1, 5, 6, 7), 2), Encoded((1, 8, 9), 2)], 0)
RETAIN = collate([Encoded((1, 2, 3), 1), Encoded((1, 4, 9, 10), 3)], 0)


def fixed(seed):
    """A model that gives random logits, other ones for forget than for retain."""
    generator = torch.Generator().manual_seed(seed)
    given = {id(b): torch.randn(*b.input_ids.shape, 11, generator=generator) * 3 for b in (FORGET, RETAIN)}
    by_ids = {tuple(b.input_ids.flatten().tolist()): given[id(b)] for b in (FORGET, RETAIN)}
    return lambda input_ids, **_: SimpleNamespace(logits=by_ids[tuple(input_ids.flatten().tolist())])


def slow_log_probs(model, batch):
    logits = model(**batch.inputs()).logits.double()
    for i, row in enumerate(batch.answer_mask):
        yield [logits[i, t - 1].log_softmax(-1)[batch.input_ids[i, t]].item() for t in range(1, len(row)) if row[t]]


@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 1.0), (0.5, 2.0), (2.0, 0.0)])
def test_loss_agrees_with_the_formula_in_a_loop(beta, alpha):
    model, start = fixed(0), fixed(1)
    terms = []
    for now, before in zip(slow_log_probs(model, FORGET), slow_log_probs(start, FORGET), strict=True):
        ratio = sum(now) - sum(before)
        terms.append(-2 / beta * math.log(1 / (1 + math.exp(beta * ratio))))
    tokens = [p for row in slow_log_probs(model, RETAIN) for p in row]
    expected = sum(terms) / len(terms) - alpha * sum(tokens) / len(tokens)
    assert npo.loss(model, FORGET, RETAIN, start=start, beta=beta, alpha=alpha).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_at_the_start_the_forget_term_is_two_log_two_over_beta():
    model = fixed(0)
    found = npo.loss(model, FORGET, RETAIN, start=model, beta=0.1, alpha=0.0)
    assert found.item() == pytest.approx(2 / 0.1 * math.log(2), rel=1e-6)


def test_small_beta_has_the_gradient_of_gradient_ascent():
    logits = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(2)).requires_grad_()
    retain = torch.zeros(2, 4, 11)

    def model(input_ids, **_):
        return SimpleNamespace(logits=logits if input_ids is FORGET.input_ids else retain)

    npo.loss(model, FORGET, RETAIN, start=fixed(1), beta=1e-4, alpha=0.0).backward()
    found, logits.grad = logits.grad.clone(), None
    total = sum(
        logits[i, t - 1].log_softmax(-1)[FORGET.input_ids[i, t]]
        for i in range(2)
        for t in range(1, 4)
        if FORGET.answer_mask[i, t]
    )
    (total / 2).backward()
    assert torch.allclose(found, logits.grad, rtol=1e-2, atol=1e-5)


def test_retain_is_not_read_unless_it_weighs_something():
    assert npo.loss(fixed(0), FORGET, None, start=fixed(1), alpha=0.0).isfinite()
    with pytest.raises(AttributeError):
        npo.loss(fixed(0), FORGET, None, start=fixed(1))
