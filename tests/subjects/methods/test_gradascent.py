import pytest

from lethescope.subjects.methods import gradascent, graddiff, options_of


def test_loss_agrees_with_the_formula_in_a_loop(loops):
    model = loops.fixed(0)
    found = gradascent.loss(model, loops.forget, loops.retain)
    assert found.item() == pytest.approx(-loops.nll(model, loops.forget), rel=1e-5)


def test_it_is_gradient_difference_without_its_retain_term(loops):
    model = loops.fixed(0)
    found = gradascent.loss(model, loops.forget, loops.retain)
    assert found == graddiff.loss(model, loops.forget, loops.retain, gamma=1.0, alpha=0.0)
    assert options_of(gradascent) == {}


def test_retain_logits_get_no_gradient(loops):
    model = loops.fixed(0)
    gradascent.loss(model, loops.forget, loops.retain).backward()
    assert model.leaf(loops.retain).grad is None and model.leaf(loops.forget).grad.abs().max() > 0
