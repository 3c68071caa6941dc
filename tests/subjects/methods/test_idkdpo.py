import math

import pytest
import torch

from lethescope.subjects.methods import idkdpo, npo


@pytest.mark.parametrize(("beta", "gamma", "alpha"), [(0.1, 1.0, 1.0), (0.5, 0.3, 2.0), (2.0, 1.0, 0.0)])
def test_loss_agrees_with_the_formula_in_a_loop(loops, beta, gamma, alpha):
    model, start = loops.fixed(0), loops.fixed(1)
    sums = [
        [sum(row) for row in loops.log_probs(which, batch)]
        for batch in (loops.refused, loops.forget)
        for which in (model, start)
    ]
    terms = []
    for refused, refused_before, said, said_before in zip(*sums, strict=True):
        preference = (refused - refused_before) - (said - said_before)
        terms.append(-2 / beta * math.log(1 / (1 + math.exp(-beta * preference))))
    expected = gamma * sum(terms) / len(terms) + alpha * loops.nll(model, loops.retain)
    found = idkdpo.loss(
        model, loops.forget, loops.retain, start=start, refused=loops.refused, beta=beta, gamma=gamma, alpha=alpha
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_at_the_start_the_forget_term_is_two_log_two_over_beta(loops):
    model = loops.fixed(0)
    found = idkdpo.loss(model, loops.forget, loops.retain, start=model, refused=loops.refused, alpha=0.0)
    assert found.item() == pytest.approx(2 / 0.1 * math.log(2), rel=1e-6)


def test_refusals_go_up_as_answers_go_down(loops):
    model = loops.fixed(0)
    idkdpo.loss(model, loops.forget, loops.retain, start=model, refused=loops.refused, alpha=0.0).backward()
    for batch, sign in ((loops.refused, 1), (loops.forget, -1)):
        downhill = -model.leaf(batch).grad
        for i, t in batch.answer_mask.nonzero().tolist():
            assert sign * downhill[i, t - 1, batch.input_ids[i, t]] > 0


def test_where_refusals_are_as_at_the_start_it_is_npo(loops):
    model, start = loops.fixed(0), loops.fixed(1)
    with torch.no_grad():
        start.leaf(loops.refused).copy_(model.leaf(loops.refused))
    found = idkdpo.loss(model, loops.forget, loops.retain, start=start, refused=loops.refused, beta=0.3)
    assert found.item() == pytest.approx(
        npo.loss(model, loops.forget, loops.retain, start=start, beta=0.3).item(), rel=1e-6
    )
