import math

import pytest

from lethescope.subjects.methods import graddiff, wga


def weighted(loops, model, beta):
    """The weight, logits and token of every answer token."""
    for answer in loops.answers(model, loops.forget):
        for z, y in answer:
            yield loops.softmax(z)[y] ** beta, z, y


@pytest.mark.parametrize(("beta", "gamma", "alpha"), [(1.0, 1.0, 1.0), (0.5, 0.3, 2.0), (3.0, 1.0, 0.0)])
def test_loss_agrees_with_the_formula_in_a_loop(loops, beta, gamma, alpha):
    model = loops.fixed(0)
    terms = [-w * -math.log(loops.softmax(z)[y]) for w, z, y in weighted(loops, model, beta)]
    expected = gamma * sum(terms) / len(terms) + alpha * loops.nll(model, loops.retain)
    found = wga.loss(model, loops.forget, loops.retain, beta=beta, gamma=gamma, alpha=alpha)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_no_gradient_goes_through_the_weights(loops):
    model = loops.fixed(0)
    loss = wga.loss(model, loops.forget, loops.retain, beta=2.0, alpha=0.0)
    rows = [[w * ((v == y) - p) / 3 for v, p in enumerate(loops.softmax(z))] for w, z, y in weighted(loops, model, 2.0)]
    for found, row in zip(loops.gradients(loss, model, loops.forget), rows, strict=True):
        assert found == pytest.approx(row, rel=1e-4, abs=1e-7)


def test_without_weights_it_is_gradient_difference(loops):
    model = loops.fixed(0)
    found = wga.loss(model, loops.forget, loops.retain, beta=0.0, gamma=0.5, alpha=2.0)
    assert found.item() == pytest.approx(
        graddiff.loss(model, loops.forget, loops.retain, gamma=0.5, alpha=2.0).item(), rel=1e-6
    )
