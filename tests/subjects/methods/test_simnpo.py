import math

import pytest

from lethescope.subjects.methods import simnpo


@pytest.mark.parametrize(
    ("beta", "delta", "gamma", "alpha"), [(4.5, 0.0, 0.125, 1.0), (0.5, 2.0, 1.0, 3.0), (2.0, -1.0, 1.0, 0.0)]
)
def test_loss_agrees_with_the_formula_in_a_loop(loops, beta, delta, gamma, alpha):
    model, terms = loops.fixed(0, scale=1.0), []
    for row in loops.log_probs(model, loops.forget):
        mean = -sum(row) / len(row)
        terms.append(-2 / beta * math.log(1 / (1 + math.exp(-beta * (mean - delta)))))
    expected = gamma * sum(terms) / len(terms) + alpha * loops.nll(model, loops.retain)
    found = simnpo.loss(model, loops.forget, loops.retain, beta=beta, delta=delta, gamma=gamma, alpha=alpha)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_uniform_answers_of_any_length_cost_the_same(loops):
    found = simnpo.loss(loops.fixed(0, scale=0.0), loops.forget, loops.retain, beta=0.7, gamma=1.0, alpha=0.0)
    assert found.item() == pytest.approx(2 / 0.7 * math.log1p(math.exp(-0.7 * math.log(11))), rel=1e-6)


def test_small_beta_has_the_gradient_of_ascent_with_every_answer_weighing_the_same(loops):
    model = loops.fixed(0)
    loss = simnpo.loss(model, loops.forget, loops.retain, beta=1e-5, gamma=1.0, alpha=0.0)
    expected = [
        [((v == y) - p) / len(answer) / 2 for v, p in enumerate(loops.softmax(z))]
        for answer in loops.answers(model, loops.forget)
        for z, y in answer
    ]
    for found, row in zip(loops.gradients(loss, model, loops.forget), expected, strict=True):
        assert found == pytest.approx(row, rel=1e-3, abs=1e-6)
