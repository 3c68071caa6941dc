import math

import pytest

from lethescope.subjects.methods import ceu, undial


def target(loops, z, y, beta):
    return loops.softmax([x - beta * (v == y) for v, x in enumerate(z)])


@pytest.mark.parametrize(("beta", "gamma", "alpha"), [(10.0, 1.0, 0.0), (3.0, 0.5, 2.0)])
def test_loss_agrees_with_the_formula_in_a_loop(loops, beta, gamma, alpha):
    model, start, terms = loops.fixed(0), loops.fixed(1), []
    for now, before in zip(loops.answers(model, loops.forget), loops.answers(start, loops.forget), strict=True):
        for (z, y), (z_start, _) in zip(now, before, strict=True):
            aim = target(loops, z_start, y, beta)
            terms.append(-sum(q * math.log(p) for q, p in zip(aim, loops.softmax(z), strict=True)))
    expected = gamma * sum(terms) / len(terms) + alpha * loops.nll(model, loops.retain)
    found = undial.loss(model, loops.forget, loops.retain, start=start, beta=beta, gamma=gamma, alpha=alpha)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_what_is_said_less_what_should_be(loops):
    model, start = loops.fixed(0), loops.fixed(1)
    loss = undial.loss(model, loops.forget, loops.retain, start=start)
    pairs = zip(
        [token for answer in loops.answers(model, loops.forget) for token in answer],
        [token for answer in loops.answers(start, loops.forget) for token in answer],
        strict=True,
    )
    rows = [
        [(p - q) / 3 for p, q in zip(loops.softmax(z), target(loops, z_start, y, 10.0), strict=True)]
        for (z, y), (z_start, _) in pairs
    ]
    for found, row in zip(loops.gradients(loss, model, loops.forget), rows, strict=True):
        assert found == pytest.approx(row, rel=1e-4, abs=1e-6)


def test_nothing_to_lower_is_nothing_to_learn_at_the_start(loops):
    model = loops.fixed(0)
    loss = undial.loss(model, loops.forget, loops.retain, start=model, beta=0.0)
    assert max(abs(g) for row in loops.gradients(loss, model, loops.forget) for g in row) < 1e-6


def test_retain_is_not_read_unless_it_weighs_something(loops):
    model = loops.fixed(0)
    undial.loss(model, loops.forget, None, start=model).backward()
    assert model.leaf(loops.retain).grad is None


def test_lowered_without_end_it_is_ceu_at_the_start(loops):
    model = loops.fixed(0)
    found = undial.loss(model, loops.forget, loops.retain, start=model, beta=1e4)
    assert found.item() == pytest.approx(ceu.loss(model, loops.forget, loops.retain, ignore_first=0).item(), rel=1e-6)
