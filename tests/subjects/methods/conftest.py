"""What the methods' tests share: made-up logits with plain Python over them, for textbook twins, and runs on a toy."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from lethescope.facts import of_split
from lethescope.subjects.methods import unlearn
from lethescope.subjects.methods.training import Lessons
from lethescope.tokens import Encoded, collate

SETTINGS = {"steps": 4, "lr": 1e-3, "batch_size": 8, "seed": 0, "refusals": ("baker", "cello"), "progress": False}
"""What a run on a toy is given unless told otherwise; the refusals are words that the toy's tokenizer knows."""
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


def splits(toy):
    return [of_split(toy.facts, name) for name in ("forget", "retain")]


@pytest.fixture
def run():
    """Unlearn in a copy of a toy's model: `run(toy, method="npo", steps=60)`; what is not given is as in `SETTINGS`."""

    def unlearned(toy, **options):
        model = copy.deepcopy(toy.model)
        assert unlearn(model, *splits(toy), tokenizer=toy.tokenizer, **SETTINGS | options) is model
        return model

    return unlearned


@pytest.fixture
def lessons_for():
    """The lessons of such a run, for tests that call a method's own functions: `lessons_for(toy, batch_size=1)`."""
    return lambda toy, **settings: Lessons(*splits(toy), toy.tokenizer, toy.model.device, **SETTINGS | settings)
