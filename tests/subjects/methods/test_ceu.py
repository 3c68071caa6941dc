import math
from types import SimpleNamespace

import pytest
import torch

from lethescope.subjects.methods import ceu
from lethescope.tokens import Encoded, collate


@pytest.fixture
def batch():
    return collate([Encoded((1, 5, 6, 7), 1), Encoded((1, 8, 9), 2), Encoded((1, 3, 4, 2), 2)], 0)


def tokens(loops, model, batch, ignore_first):
    """The logits and token of every answer token that counts."""
    for answer in loops.answers(model, batch):
        yield from answer[ignore_first:] if len(answer) > ignore_first else answer


def target(loops, z, y):
    return loops.softmax([-math.inf if v == y else x for v, x in enumerate(z)])


def made_up(batch):
    leaf = (torch.randn(*batch.input_ids.shape, 11, generator=torch.Generator().manual_seed(0)) * 3).requires_grad_()
    return leaf, lambda **_: SimpleNamespace(logits=leaf)


@pytest.mark.parametrize("ignore_first", [0, 1, 2])
def test_loss_and_gradient_agree_with_the_formula_in_a_loop(loops, batch, ignore_first):
    leaf, model = made_up(batch)
    terms, rows = [], []
    for z, y in tokens(loops, model, batch, ignore_first):
        said, aim = loops.softmax(z), target(loops, z, y)
        terms.append(-sum(q * math.log(p) for q, p in zip(aim, said, strict=True)))
        rows.append([p - q for p, q in zip(said, aim, strict=True)])
    loss = ceu.loss(model, batch, None, ignore_first=ignore_first)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    loss.backward()
    touched = leaf.grad.abs().sum(-1) > 0
    assert touched.sum() == len(rows)
    for found, row in zip(leaf.grad[touched].tolist(), rows, strict=True):
        assert found == pytest.approx([g / len(rows) for g in row], rel=1e-4, abs=1e-6)


def test_first_tokens_are_left_alone_where_others_follow(batch):
    kept = [row.nonzero()[:, 0].tolist() for row in ceu.without_first(batch, 1).answer_mask]
    assert kept == [[2, 3], [2], [3]]
    kept = [row.nonzero()[:, 0].tolist() for row in ceu.without_first(batch, 2).answer_mask]
    assert kept == [[3], [2], [2, 3]]
    assert torch.equal(ceu.without_first(batch, 0).answer_mask, batch.answer_mask)


def test_left_padding_leaves_the_same_tokens_alone():
    encoded = [Encoded((1, 5, 6, 7), 1), Encoded((1, 8, 9), 2)]
    batch = ceu.without_first(collate(encoded, 0, side="left"), 1)
    assert batch.input_ids[batch.answer_mask].tolist() == [6, 7, 9]


def test_at_even_odds_the_gradient_moves_the_answer_down_and_all_others_up_alike(loops):
    model = loops.fixed(0, scale=0.0)
    loss = ceu.loss(model, loops.forget, loops.retain, ignore_first=0)
    for row, y in zip(loops.gradients(loss, model, loops.forget), (6, 7, 9), strict=True):
        assert row[y] == pytest.approx(1 / 11 / 3)
        assert [g for v, g in enumerate(row) if v != y] == pytest.approx([-1 / 110 / 3] * 10)
