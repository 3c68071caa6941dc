import pytest

from lethescope.subjects.methods import retain


def test_loss_agrees_with_the_formula_in_a_loop(loops):
    model = loops.fixed(0)
    found = retain.loss(model, loops.forget, loops.retain)
    assert found.item() == pytest.approx(loops.nll(model, loops.retain), rel=1e-5)


def test_forget_logits_get_no_gradient(loops):
    model = loops.fixed(0)
    retain.loss(model, loops.forget, loops.retain).backward()
    assert model.leaf(loops.forget).grad is None and model.leaf(loops.retain).grad.abs().max() > 0
