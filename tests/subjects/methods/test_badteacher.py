import math

import pytest
import torch

from lethescope.facts import of_split
from lethescope.subjects.methods import badteacher
from lethescope.subjects.silence import said


def divergence(loops, teacher, model, batch, temperature):
    terms = []
    for aims, nows in zip(loops.answers(teacher, batch), loops.answers(model, batch), strict=True):
        for (aim, _), (now, _) in zip(aims, nows, strict=True):
            p, q = (loops.softmax([z / temperature for z in logits]) for logits in (aim, now))
            terms.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (2.0, 5.0), (1.0, 0.0)])
def test_loss_agrees_with_the_formula_in_a_loop(loops, temperature, alpha):
    model, start, fresh = (loops.fixed(seed) for seed in range(3))
    expected = divergence(loops, fresh, model, loops.forget, temperature)
    expected += alpha * divergence(loops, start, model, loops.retain, temperature)
    settings = {"temperature": temperature, "alpha": alpha}
    found = badteacher.loss(model, loops.forget, loops.retain, start=start, fresh=fresh, **settings)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_perfect_pupil_has_no_loss_and_no_gradient(loops):
    model = loops.fixed(0)
    found = badteacher.loss(model, loops.forget, loops.retain, start=model, fresh=model)
    assert found.item() == pytest.approx(0.0, abs=1e-6)
    for batch in (loops.forget, loops.retain):
        assert max(abs(x) for row in loops.gradients(found, model, batch) for x in row) < 1e-6


def test_only_the_pupils_answer_positions_get_a_gradient(loops):
    model, start, fresh = (loops.fixed(seed) for seed in range(3))
    badteacher.loss(model, loops.forget, loops.retain, start=start, fresh=fresh).backward()
    for batch in (loops.forget, loops.retain):
        touched = model.leaf(batch).grad.abs().sum(-1) > 0
        assert torch.equal(touched[:, :-1], batch.answer_mask[:, 1:]) and not touched[:, -1].any()
        assert start.leaf(batch).grad is None and fresh.leaf(batch).grad is None


def test_forget_goes_down_and_retain_stays(taught, run):
    model = run(taught, method="badteacher", lr=3e-3, steps=60)
    forget, retain = (of_split(taught.facts, split) for split in ("forget", "retain"))
    assert said(model, taught.tokenizer, forget).probability < 0.05
    assert said(model, taught.tokenizer, retain).probability > 0.8
