import doctest

import pytest
import torch

from lethescope.facts import of_split
from lethescope.subjects.methods import blur, npo
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.training import frozen_copy, trainable, training
from lethescope.subjects.silence import said


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).tolist()


def inner(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("gamma", [1.0, 0.3, 0.0])
def test_the_direction_is_the_formula_over_all_tensors_at_once(gamma):
    generator = torch.Generator().manual_seed(0)
    forget, retain = ([torch.randn(s, generator=generator) for s in ((4,), (2, 3))] for _ in range(2))
    f, r = flat(forget), flat(retain)
    weight = gamma - inner(r, f) / inner(f, f)
    found = flat(blur.direction(forget, retain, gamma))
    assert found == pytest.approx([y + weight * x for x, y in zip(f, r, strict=True)], rel=1e-4, abs=1e-5)
    assert inner(found, f) == pytest.approx(gamma * inner(f, f), rel=1e-4, abs=1e-4), "whatever retain wants"


def test_where_nothing_is_left_to_forget_the_retain_gradient_is_followed():
    retain = [torch.tensor([1.0, -2.0])]
    assert torch.equal(blur.direction([torch.zeros(2)], retain, 1.0)[0], retain[0])


def test_a_step_hands_over_the_direction(taught, lessons_for, monkeypatch):
    lessons, handed = lessons_for(taught, lr=3e-3), []

    def one(weights, _lessons, step):
        with torch.no_grad():
            weights[0].add_(0.05)  # away from the start
        assert not step(0.0).requires_grad
        handed.extend(w.grad.clone() for w in weights)

    monkeypatch.setattr(blur, "descend", one)
    with training(taught.model) as model:
        start = frozen_copy(model)
        blur.edit(model, lessons, gamma=0.5, beta=0.2)
        f, r = next(lessons.batches("forget")), next(lessons.batches("retain"))
        push = torch.autograd.grad(npo.loss(model, f, r, start=start, beta=0.2, alpha=0.0), trainable(model))
        keep = torch.autograd.grad(nll(model, r), trainable(model))
    along = sum((x * y).sum() for x, y in zip(push, keep, strict=True)) / sum(x.square().sum() for x in push)
    assert abs(along) > 1e-4
    for now, x, y in zip(handed, push, keep, strict=True):
        assert torch.allclose(now, y + (0.5 - along) * x, rtol=1e-3, atol=1e-5)


def test_forget_goes_down_and_retain_stays(taught, run):
    model = run(taught, method="blur", lr=3e-3, steps=60, gamma=0.3)
    forget, retain = (said(model, taught.tokenizer, of_split(taught.facts, s)) for s in ("forget", "retain"))
    assert forget.probability < 0.05 and forget.exact < 0.05
    assert retain.probability > 0.8 and retain.exact > 0.9


def test_doctests():
    assert doctest.testmod(blur).failed == 0
