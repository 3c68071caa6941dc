import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.subjects.methods import vila
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.gradients import linear_maps, low_rank
from lethescope.subjects.methods.training import training
from lethescope.subjects.silence import said


def test_inverted_hinge_agrees_with_a_loop(loops):
    model, terms = loops.fixed(0), []
    for answer in loops.answers(model, loops.forget):
        for logits, token in answer:
            p = loops.softmax(logits)
            terms.append(1 + p[token] - max(x for v, x in enumerate(p) if v != token))
    assert vila.inverted_hinge(model, loops.forget).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_inverted_hinge_goes_from_two_to_zero_and_never_touches_prompts(loops):
    logits = torch.zeros(2, 4, 11)
    for i, t in loops.forget.answer_mask.nonzero().tolist():
        logits[i, t - 1, loops.forget.input_ids[i, t]] = 50.0
    sure = vila.inverted_hinge(lambda **_: SimpleNamespace(logits=logits), loops.forget)
    assert sure.item() == pytest.approx(2.0, abs=1e-5)
    wrong = vila.inverted_hinge(lambda **_: SimpleNamespace(logits=logits.roll(1, -1)), loops.forget)
    assert wrong.item() == pytest.approx(0.0, abs=1e-5)
    model = loops.fixed(1)
    vila.inverted_hinge(model, loops.forget).backward()
    touched = model.leaf(loops.forget).grad.abs().sum(-1) > 0
    assert torch.equal(touched[:, :-1], loops.forget.answer_mask[:, 1:]) and not touched[:, -1].any()


def test_factors_are_the_best_weighed_approximation():
    generator = torch.Generator().manual_seed(0)
    weight, ratio = torch.randn(12, 9, generator=generator), torch.rand(12, 9, generator=generator) * 5 + 0.1
    a, b = vila.weighted_factors(weight, ratio, 3, 2.0)
    row = torch.tensor([sum(line) ** 0.5 for line in ratio.tolist()])[:, None]
    tail = torch.linalg.svdvals(row * weight)[3:].square().sum().sqrt()
    assert (row * (weight - 2 * b @ a)).norm().item() == pytest.approx(tail.item(), rel=1e-4)
    assert a.norm(dim=1).square().tolist() == pytest.approx((torch.linalg.svdvals(row * weight)[:3] / 2).tolist())
    whole = vila.weighted_factors(weight, ratio, 9, 0.5)
    assert torch.allclose(0.5 * whole[1] @ whole[0], weight, atol=1e-4)


def grads(model, names, batches):
    """One list of gradients by name a batch, and the batches' answer tokens."""
    found = []
    for batch in batches:
        model.zero_grad()
        nll(model, batch).backward()
        found.append({name: model.get_parameter(name).grad.double().clone() for name in names})
    return found, [float(batch.answer_mask.sum()) for batch in batches]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fila_weighs_by_the_mean_squared_gradient_of_the_whole_weight(toy, lessons_for, kind):
    if kind == "gpt2":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = GPT2Config(vocab_size=len(toy.tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
            toy.model = GPT2LMHeadModel(config).eval()
    model, lessons = toy.model.requires_grad_(True), lessons_for(toy)
    maps = linear_maps(model)
    names, means = [f"{m.name}.weight" for m in maps], []
    for split in ("forget", "retain"):
        found, shares = grads(copy.deepcopy(model), names, list(lessons.once(split, 5)))
        total = sum(shares)
        means.append({n: sum(s * g[n] ** 2 for s, g in zip(shares, found, strict=True)) / total for n in names})
    with low_rank(model, maps, rank=4) as factors:
        ratios = vila.RATIOS["fisher"](model, lessons, factors, 0.05, 5)
        assert not any(m.module.weight.requires_grad for m in maps)
    for m, name, ratio in zip(maps, names, ratios, strict=True):
        expected = means[0][name] / (means[1][name] + 1e-5)
        expected = expected.T if kind == "gpt2" else expected
        assert ratio.shape == m.weight.shape
        assert torch.allclose(ratio.double(), expected, rtol=1e-3, atol=1e-7)


def test_vila_weighs_by_the_product_of_the_factors_variances(toy, lessons_for):
    model, lessons = toy.model.requires_grad_(True), lessons_for(toy)
    with low_rank(model, linear_maps(model), rank=3) as factors:
        ratios = vila.RATIOS["variance"](model, lessons, factors, 0.05, 5)
        names = {p: n for n, p in model.named_parameters()}
        drawn = torch.cat([p.flatten() for f in factors for p in (f.a, f.b)])
        assert drawn.std().item() == pytest.approx(0.05, rel=0.05)
        spreads = []
        for split in ("forget", "retain"):
            found, shares = grads(model, [names[p] for f in factors for p in (f.a, f.b)], list(lessons.once(split, 5)))
            spread = {}
            for n in found[0]:
                mean = sum(s * g[n] for s, g in zip(shares, found, strict=True)) / sum(shares)
                square = sum(s * g[n] ** 2 for s, g in zip(shares, found, strict=True)) / sum(shares)
                spread[n] = square - mean**2
            spreads.append(spread)
        for f, ratio in zip(factors, ratios, strict=True):
            forget, retain = (s[names[f.b]] @ s[names[f.a]] for s in spreads)
            assert torch.allclose(ratio.double(), forget / (retain + 1e-5), rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("importance", ["variance", "fisher"])
def test_the_model_starts_as_it_was_and_its_factors_do_not(toy, lessons_for, monkeypatch, importance):
    lessons, seen = lessons_for(toy, lr=5e-3), []
    batch = next(lessons.batches("forget"))
    logits = toy.model(**batch.inputs()).logits.detach()

    def look(weights, _lessons, _step):
        seen.extend([w.detach().norm().item() for w in weights])
        assert torch.allclose(toy.model(**batch.inputs()).logits, logits, atol=1e-4)

    monkeypatch.setattr(vila, "descend", look)
    with training(toy.model) as model:
        vila.edit(model, lessons, importance=importance)
    assert len(seen) == 28 and min(seen) > 1e-3
    assert torch.allclose(toy.model(**batch.inputs()).logits, logits, atol=1e-4)


@pytest.mark.parametrize("importance", ["variance", "fisher"])
def test_forget_goes_down_and_retain_stays(taught, run, importance):
    model = run(taught, method="vila", lr=5e-3, importance=importance, steps=60, alpha=3.0)
    forget, retain = (said(model, taught.tokenizer, of_split(taught.facts, s)) for s in ("forget", "retain"))
    assert forget.probability < 0.1 and forget.exact < 0.1
    assert retain.probability > 0.8 and retain.exact > 0.9


def test_the_seed_decides(toy, run):
    first, again, other = (run(toy, method="vila", lr=5e-3, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in first.named_parameters())
    assert not torch.equal(first.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_only_trained_blocks_get_factors(toy, run):
    model = run(toy, method="vila", lr=5e-3, blocks=(1,))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, toy.model.get_parameter(n))}
    assert len(changed) == 7 and all(name.startswith("model.layers.1.") for name in changed)


def test_another_importance_is_refused(toy, run):
    with pytest.raises(InputError, match=r"'variance' .* or 'fisher' .*, not 'hessian'"):
        run(toy, method="vila", importance="hessian")
