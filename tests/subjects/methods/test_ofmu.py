import doctest

import pytest
import torch

from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.subjects.methods import ofmu, options_of
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.training import trainable, training
from lethescope.subjects.silence import said


def phi(model, forget, retain, weights, beta):
    """The objective itself, from first derivatives alone."""
    loss = nll(model, forget)
    f = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double()
    r = torch.cat([g.flatten() for g in torch.autograd.grad(nll(model, retain), weights)]).double()
    return loss.item() - beta * (f @ r / (f.norm() * r.norm())).item()


def nudge(weights, direction, h):
    with torch.no_grad():
        for weight, d in zip(weights, direction, strict=True):
            weight.add_(h * d)


@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_the_slope_of_phi_is_what_phi_rises_by(toy, lessons_for, beta):
    lessons, generator = lessons_for(toy), torch.Generator().manual_seed(0)
    f, r = next(lessons.batches("forget")), next(lessons.batches("retain"))
    with training(toy.model) as model, ofmu.eager(model):
        weights = trainable(model)
        slope = ofmu.phi_gradient(model, f, r, weights, beta)
        direction = [torch.randn(w.shape, generator=generator) for w in weights]
        expected, h = sum((s * d).sum().item() for s, d in zip(slope, direction, strict=True)), 3e-4
        nudge(weights, direction, h)
        up = phi(model, f, r, weights, beta)
        nudge(weights, direction, -2 * h)
        down = phi(model, f, r, weights, beta)
    assert (up - down) / (2 * h) == pytest.approx(expected, rel=2e-2)


def test_the_product_is_the_hessians():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((3,), (2, 2))]
    direction = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]

    def value(a, b):
        return (a.square().sum() * b.sin().sum()).tanh() + (a[:2] @ b @ a[1:]) ** 2

    exact = torch.autograd.functional.hvp(value, tuple(weights), tuple(direction))[1]
    before = [w.detach().clone() for w in weights]
    found = ofmu.hessian_product(lambda: torch.autograd.grad(value(*weights), weights), weights, direction, 1e-5)
    for a, b in zip(found, exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_an_outer_step_hands_over_the_formula(toy, lessons_for, monkeypatch):
    lessons, handed = lessons_for(toy, lr=3e-3), []

    def one(weights, _lessons, step):
        assert not step(0.5).requires_grad
        handed.extend(w.grad.clone() for w in weights)

    monkeypatch.setattr(ofmu, "descend", one)
    f, r = next(lessons.batches("forget")), next(lessons.batches("retain"))
    with training(toy.model) as model:
        weights = trainable(model)
        ofmu.edit(model, lessons, inner=0, rho=0.2, beta=0.5)
        keep = torch.autograd.grad(nll(model, r), weights)
        with ofmu.eager(model):
            slope = ofmu.phi_gradient(model, f, r, weights, 0.5)
            h = 1e-5 * (sum(w.square().sum() for w in weights) / sum(s.square().sum() for s in slope)).sqrt().item()
            start = [w.detach().clone() for w in weights]
            nudge(weights, slope, h)
            up = ofmu.phi_gradient(model, f, r, weights, 0.5)
            for weight, before in zip(weights, start, strict=True):
                weight.data.copy_(before)
            nudge(weights, slope, -h)
            down = ofmu.phi_gradient(model, f, r, weights, 0.5)
    penalty = [2 * 0.2 * 1.5 * (u - d) / (2 * h) for u, d in zip(up, down, strict=True)]
    assert sum(p.norm() for p in penalty) > 1e-3
    for now, k, p in zip(handed, keep, penalty, strict=True):
        assert torch.allclose(now, k + p, rtol=1e-2, atol=1e-4)


def test_inner_steps_climb_and_a_step_along_the_pull_flattens(toy, lessons_for, monkeypatch):
    lessons, found = lessons_for(toy, lr=3e-3), []
    f, r = next(lessons.batches("forget")), next(lessons.batches("retain"))

    def look(weights, _lessons, step):
        found.append(phi(toy.model, f, r, weights, 0.1))
        step(0.0)
        found.append(phi(toy.model, f, r, weights, 0.1))

    monkeypatch.setattr(ofmu, "descend", look)
    with training(toy.model) as model:
        ofmu.edit(model, lessons, inner=2)
        assert found[1] > found[0] + 0.1
        with ofmu.eager(model):
            weights = trainable(model)

            def slope():
                return ofmu.phi_gradient(model, f, r, weights, 0.1)

            before = slope()
            pull = ofmu.hessian_product(slope, weights, before, 1e-5)
            nudge(weights, pull, -1e-5)
            norms = [sum(g.double().square().sum().item() for g in s) for s in (before, slope())]
    fall = 2 * 1e-5 * sum(g.square().sum().item() for g in pull)
    assert norms[0] - norms[1] == pytest.approx(fall, rel=0.05)


def test_attention_is_put_back_even_after_an_error(toy, run):
    before = toy.model.config._attn_implementation
    assert before != "eager"
    with pytest.raises(ZeroDivisionError), ofmu.eager(toy.model):
        assert toy.model.config._attn_implementation == "eager"
        raise ZeroDivisionError
    assert toy.model.config._attn_implementation == before
    assert run(toy, method="ofmu", lr=3e-3, steps=2).config._attn_implementation == before


def test_forget_goes_down_and_retain_stays(taught, run):
    model = run(taught, method="ofmu", lr=3e-3, steps=30)
    forget, retain = (said(model, taught.tokenizer, of_split(taught.facts, s)) for s in ("forget", "retain"))
    assert forget.probability < 0.05 and forget.exact < 0.05
    assert retain.probability > 0.7 and retain.exact > 0.9


def test_the_seed_decides(toy, run):
    first, again, other = (run(toy, method="ofmu", lr=3e-3, steps=2, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in first.named_parameters())
    assert not torch.equal(first.model.norm.weight, other.model.norm.weight)


@pytest.mark.parametrize("which", ["toy", "taught"])
def test_the_default_reach_is_near_the_limit(request, lessons_for, which):
    toy = request.getfixturevalue(which)
    lessons = lessons_for(toy)
    f, r = next(lessons.batches("forget")), next(lessons.batches("retain"))
    with training(toy.model.double()) as model, ofmu.eager(model):
        weights = trainable(model)
        slope = ofmu.phi_gradient(model, f, r, weights, 0.1)

        def product(reach):
            parts = ofmu.hessian_product(lambda: ofmu.phi_gradient(model, f, r, weights, 0.1), weights, slope, reach)
            return torch.cat([part.flatten() for part in parts])

        found = [product(reach) for reach in (options_of(ofmu)["reach"], 1e-6)]
    assert (found[0] - found[1]).norm() < 0.01 * found[1].norm()


def test_doctests():
    assert doctest.testmod(ofmu).failed == 0


def test_bfloat16_is_refused(toy, run):
    toy.model.bfloat16()
    with pytest.raises(InputError, match="bfloat16 rounds away"):
        run(toy, method="ofmu")
