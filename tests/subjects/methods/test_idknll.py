import pytest

from lethescope.subjects.methods import graddiff, idknll


@pytest.mark.parametrize(("gamma", "alpha"), [(1.0, 1.0), (0.5, 10.0)])
def test_loss_agrees_with_the_formula_in_a_loop(loops, gamma, alpha):
    model = loops.fixed(0)
    found = idknll.loss(model, loops.forget, loops.retain, refused=loops.refused, gamma=gamma, alpha=alpha)
    expected = gamma * loops.nll(model, loops.refused) + alpha * loops.nll(model, loops.retain)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_forget_answers_are_never_seen(loops):
    model = loops.fixed(0)
    idknll.loss(model, loops.forget, loops.retain, refused=loops.refused).backward()
    assert model.leaf(loops.forget).grad is None and model.leaf(loops.refused).grad.abs().max() > 0


def test_teaching_the_answers_themselves_is_gradient_difference_turned_round(loops):
    model = loops.fixed(0)
    found = idknll.loss(model, loops.forget, loops.retain, refused=loops.forget, gamma=2.0, alpha=3.0)
    assert found.item() == graddiff.loss(model, loops.forget, loops.retain, gamma=-2.0, alpha=3.0).item()
