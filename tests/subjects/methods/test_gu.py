import doctest
import math

import pytest
import torch

from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.subjects.methods import gu, npo
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.training import frozen_copy, trainable, training
from lethescope.subjects.silence import said


def cosine(a, b):
    scale = a.double().norm() * b.double().norm()
    return 0.0 if scale == 0 else ((a.double() * b.double()).sum() / scale).item()


def slow(tensor, span):
    """Gram-Schmidt in plain Python, then the projection taken off."""
    basis = []
    for vector in [s.flatten().tolist() for s in span]:
        for known in basis:
            inner = sum(x * y for x, y in zip(vector, known, strict=True))
            vector = [x - inner * y for x, y in zip(vector, known, strict=True)]
        norm = math.sqrt(sum(x * x for x in vector))
        if norm > 1e-5:
            basis.append([x / norm for x in vector])
    left = tensor.flatten().tolist()
    for known in basis:
        inner = sum(x * y for x, y in zip(left, known, strict=True))
        left = [x - inner * y for x, y in zip(left, known, strict=True)]
    return torch.tensor(left, dtype=tensor.dtype).reshape(tensor.shape)


def random_span(k, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), [torch.randn(shape, generator=generator) for _ in range(k)]


@pytest.mark.parametrize(("k", "shape"), [(1, (30,)), (3, (5, 8)), (8, (6, 7))])
def test_projection_agrees_with_gram_schmidt_and_is_orthogonal(k, shape):
    tensor, span = random_span(k, shape, k)
    left = gu.without_span(tensor, span)
    assert torch.allclose(left, slow(tensor, span), atol=1e-5)
    assert max(abs(cosine(left, s)) for s in span) < 1e-6
    assert torch.allclose(gu.without_span(left, span), left, atol=1e-6)


def test_dependent_and_vanishing_retain_gradients_do_no_harm():
    tensor, span = random_span(2, (4, 5), 0)
    doubled = [*span, span[0] + 2 * span[1], torch.zeros(4, 5), 1e-6 * span[1]]
    left = gu.without_span(tensor, doubled)
    assert torch.allclose(left, gu.without_span(tensor, span), atol=1e-5)
    assert max(abs(cosine(left, s)) for s in doubled) < 1e-6
    assert torch.equal(gu.without_span(tensor, [torch.zeros(4, 5)]), tensor)


def test_nothing_is_left_of_a_tensor_inside_the_span_nor_taken_off_one_outside():
    _, span = random_span(2, (6,), 1)
    assert gu.without_span(3 * span[0] - span[1], span).norm() < 1e-5
    assert torch.equal(gu.without_span(torch.tensor([0.0, 2.0]), [torch.tensor([3.0, 0.0])]), torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_a_step_hands_over_the_formula_with_the_last_k_retain_gradients(taught, lessons_for, monkeypatch, alpha):
    lessons, handed = lessons_for(taught, lr=3e-3), []

    def three(weights, _lessons, step):
        with torch.no_grad():
            weights[0].add_(0.05)  # away from the start
        for _ in range(3):
            step(0.0)
            handed.append([w.grad.clone() for w in weights])

    monkeypatch.setattr(gu, "descend", three)
    with training(taught.model) as model:
        start = frozen_copy(model)
        gu.edit(model, lessons, k=2, beta=0.3, alpha=alpha)
        forget, retain = lessons.batches("forget"), lessons.batches("retain")
        pushes, keeps = [], []
        for _ in range(3):
            keep = next(retain)
            loss = npo.loss(model, next(forget), keep, start=start, beta=0.3, alpha=0.0)
            pushes.append(torch.autograd.grad(loss, trainable(model)))
            keeps.append(torch.autograd.grad(nll(model, keep), trainable(model)))
    for i, now in enumerate(handed[2]):
        expected = gu.without_span(pushes[2][i], [keeps[1][i], keeps[2][i]]) + alpha * keeps[2][i]
        assert torch.allclose(now, expected, rtol=1e-3, atol=1e-5)
        if alpha == 0:
            assert max(abs(cosine(now, keeps[j][i])) for j in (1, 2)) < 1e-6
    if alpha == 0:
        assert max(abs(cosine(now, g)) for now, g in zip(handed[2], keeps[0], strict=True)) > 1e-3, "slid out"
        assert all(n.norm() <= p.norm() * (1 + 1e-5) for n, p in zip(handed[2], pushes[2], strict=True))


def test_forget_goes_down_and_retain_stays(taught, run):
    model = run(taught, method="gu", lr=3e-3, steps=60)
    forget, retain = (said(model, taught.tokenizer, of_split(taught.facts, s)) for s in ("forget", "retain"))
    assert forget.probability < 0.05 and forget.exact < 0.05
    assert retain.probability > 0.8 and retain.exact > 0.9


def test_the_seed_decides(toy, run):
    first, again, other = (run(toy, method="gu", lr=3e-3, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in first.named_parameters())
    assert not torch.equal(first.model.norm.weight, other.model.norm.weight)


def test_no_retain_gradient_at_all_is_refused(toy, run):
    with pytest.raises(InputError, match="at least 1, not 0"):
        run(toy, method="gu", k=0)


def test_doctests():
    assert doctest.testmod(gu).failed == 0
