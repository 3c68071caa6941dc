import math

import pytest
import torch

from lethescope.subjects.methods import satimp, wga


def weighted(loops, model, beta1, beta2):
    """The weight, logits and token of every answer token."""
    for answer in loops.answers(model, loops.forget):
        for z, y in answer:
            p = loops.softmax(z)[y]
            yield p**beta1 * (1 - p) ** beta2, z, y


@pytest.mark.parametrize(
    ("beta1", "beta2", "gamma", "alpha"), [(5.0, 1.0, 0.1, 1.0), (0.5, 2.0, 1.0, 2.0), (1.0, 0.5, 1.0, 0.0)]
)
def test_loss_agrees_with_the_formula_in_a_loop(loops, beta1, beta2, gamma, alpha):
    model = loops.fixed(0)
    terms = [-w * -math.log(loops.softmax(z)[y]) for w, z, y in weighted(loops, model, beta1, beta2)]
    expected = gamma * sum(terms) / len(terms) + alpha * loops.nll(model, loops.retain)
    found = satimp.loss(model, loops.forget, loops.retain, beta1=beta1, beta2=beta2, gamma=gamma, alpha=alpha)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_no_gradient_goes_through_the_weights(loops):
    model = loops.fixed(0, scale=1.0)
    loss = satimp.loss(model, loops.forget, loops.retain, beta1=2.0, beta2=0.5, gamma=1.0, alpha=0.0)
    rows = [
        [w * ((v == y) - p) / 3 for v, p in enumerate(loops.softmax(z))] for w, z, y in weighted(loops, model, 2.0, 0.5)
    ]
    for found, row in zip(loops.gradients(loss, model, loops.forget), rows, strict=True):
        assert found == pytest.approx(row, rel=1e-4, abs=1e-7)


def test_without_importance_it_is_weighted_gradient_ascent(loops):
    model = loops.fixed(0)
    found = satimp.loss(model, loops.forget, loops.retain, beta1=1.5, beta2=0.0, gamma=0.5, alpha=2.0)
    assert found.item() == pytest.approx(
        wga.loss(model, loops.forget, loops.retain, beta=1.5, gamma=0.5, alpha=2.0).item(), rel=1e-6
    )


def test_a_token_known_for_certain_gets_no_push(loops):
    model = loops.fixed(0)
    with torch.no_grad():
        for i, t in loops.forget.answer_mask.nonzero().tolist():
            model.leaf(loops.forget)[i, t - 1, loops.forget.input_ids[i, t]] = 100.0
    loss = satimp.loss(model, loops.forget, loops.retain)
    assert all(g == 0 for row in loops.gradients(loss, model, loops.forget) for g in row)
