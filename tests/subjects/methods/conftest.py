"""Made-up logits, and plain Python over them: every loss has its slow textbook twin written with these."""

import math
from types import SimpleNamespace

import pytest
import torch

from lethescope.tokens import Encoded, collate

FORGET = collate([Encoded((1, 5, 6, 7), 2), Encoded((1, 8, 9), 2)], 0)
REFUSED = collate([Encoded((1, 5, 3), 2), Encoded((1, 8, 2, 4, 10), 2)], 0)
RETAIN = collate([Encoded((1, 2, 3), 1), Encoded((1, 4, 9, 10), 3)], 0)


def key(ids):
    return tuple(ids.flatten().tolist())


def fixed(seed, scale=3.0):
    """A model whose logits are random leaves, other ones for every batch."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {
        key(batch.input_ids): (torch.randn(*batch.input_ids.shape, 11, generator=generator) * scale).requires_grad_()
        for batch in (FORGET, REFUSED, RETAIN)
    }

    def model(input_ids, **_):
        return SimpleNamespace(logits=leaves[key(input_ids)])

    model.leaf = lambda batch: leaves[key(batch.input_ids)]
    return model


def answers(model, batch):
    """Every answer as a list: the logits that predict a token, and the token."""
    logits = model(**batch.inputs()).logits.tolist()
    return [
        [(logits[i][t - 1], batch.input_ids[i, t].item()) for t in range(1, len(row)) if row[t]]
        for i, row in enumerate(batch.answer_mask.tolist())
    ]


def softmax(z):
    total = sum(math.exp(x) for x in z)
    return [math.exp(x) / total for x in z]


def log_probs(model, batch):
    return [[math.log(softmax(z)[y]) for z, y in answer] for answer in answers(model, batch)]


def nll(model, batch):
    tokens = [p for row in log_probs(model, batch) for p in row]
    return -sum(tokens) / len(tokens)


def gradients(loss, model, batch):
    """The loss's gradient at the logits that predict answer tokens, token after token."""
    (grad,) = torch.autograd.grad(loss, model.leaf(batch), retain_graph=True)
    return [grad[i, t - 1].tolist() for i, t in batch.answer_mask.nonzero().tolist()]


@pytest.fixture
def loops():
    return SimpleNamespace(
        forget=FORGET,
        refused=REFUSED,
        retain=RETAIN,
        fixed=fixed,
        answers=answers,
        softmax=softmax,
        log_probs=log_probs,
        nll=nll,
        gradients=gradients,
    )
