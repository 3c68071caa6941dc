import pytest
import torch

from lethescope.facts import of_split
from lethescope.subjects.methods import pdu
from lethescope.subjects.silence import said


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def steps_of(monkeypatch, toy, lessons, shares, **options):
    """The loss of every step, the model standing still."""
    found = []
    monkeypatch.setattr(pdu, "descend", lambda _weights, _lessons, step: found.extend(step(s).item() for s in shares))
    pdu.edit(toy.model, lessons, **options)
    return found


def test_flatness_agrees_with_a_loop(loops):
    model, terms = loops.fixed(0), []
    for answer in loops.answers(model, loops.forget):
        for z, _ in answer:
            terms.append((max(z) - sum(z) / len(z)) ** 2)
    found = pdu.flatness(model, loops.forget)
    assert found.item() == pytest.approx(sum(terms) / 3, rel=1e-5)
    found.backward()
    touched = model.leaf(loops.forget).grad.abs().sum(-1) > 0
    assert torch.equal(touched[:, :-1], loops.forget.answer_mask[:, 1:]) and not touched[:, -1].any()


def test_flatness_is_nothing_where_all_is_uniform_and_is_blind_to_a_shift(loops):
    flat, model = loops.fixed(0, scale=0.0), loops.fixed(0)
    assert pdu.flatness(flat, loops.forget).item() == 0
    before = pdu.flatness(model, loops.forget).item()
    with torch.no_grad():
        model.leaf(loops.forget).add_(7.0)
    assert pdu.flatness(model, loops.forget).item() == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [(100.0, 5.0, 0.3, 1.0, 0.5), (1.0, 2.0, 0.1, 0.5, 0.0), (3.0, 4.0, 50.0, 1.0, 0.25), (2.0, 1.0, 0.3, 1.0, 1.0)],
)
def test_the_multiplier_follows_the_constraint_after_the_warm_up(monkeypatch, toy, lessons_for, loops, options):
    alpha, eta, eps, gamma, warmup = options
    shares = [0.0, 0.25, 0.5, 0.75]
    lessons, weight, expected = lessons_for(toy), alpha, []
    pairs = zip(shares, lessons.batches("forget"), lessons.batches("retain"), strict=False)
    for share, forget, retain in pairs:
        excess = loops.nll(toy.model, retain) - eps
        margins = [max(z) - sum(z) / len(z) for answer in loops.answers(toy.model, forget) for z, _ in answer]
        expected.append(gamma * sum(m**2 for m in margins) / len(margins) + weight * excess)
        if share >= warmup:
            weight = max(0.0, weight + eta * excess)
    found = steps_of(monkeypatch, toy, lessons, shares, alpha=alpha, eta=eta, eps=eps, gamma=gamma, warmup=warmup)
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_same_seed_gives_the_same_weights(toy, run):
    first, again, other = (weights(run(toy, method="pdu", seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_forget_goes_down_and_retain_stays(taught, run):
    forget, retain = (of_split(taught.facts, split) for split in ("forget", "retain"))
    model = run(taught, method="pdu", steps=60, lr=3e-3)
    before = said(taught.model, taught.tokenizer, forget).probability
    assert said(model, taught.tokenizer, forget).probability < 0.2 * before
    assert said(model, taught.tokenizer, retain).exact > 0.8
