import copy
import doctest

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.subjects.methods import ssd
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.silence import said


def squares(model, batches):
    """Importance by name, with one backward pass a batch."""
    model, total = copy.deepcopy(model).requires_grad_(True), {}
    for batch in batches:
        model.zero_grad()
        nll(model, batch).backward()
        for name, parameter in model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            total[name] = total.get(name, 0) + grad.double() ** 2
    return {name: tensor / len(batches) for name, tensor in total.items()}


@pytest.mark.parametrize(("alpha", "dampening", "size"), [(1.5, 1.0, 1), (1.2, 0.5, 1), (1.5, 1.0, 5)])
def test_each_weight_follows_the_rule(taught, run, lessons_for, alpha, dampening, size):
    lessons = lessons_for(taught)
    of_forget, of_retain = lessons.examples("forget"), lessons.examples("retain")
    groups = ([e[i : i + size] for i in range(0, len(e), size)] for e in (of_forget, of_forget + of_retain))
    f, overall = (squares(taught.model, [lessons.collate(g) for g in group]) for group in groups)
    model = run(taught, method="ssd", alpha=alpha, dampening=dampening, examples=size)
    chosen = 0
    for name, before in taught.model.named_parameters():
        after, expected = model.get_parameter(name), before.detach().double().clone()
        for i in (f[name] > alpha * overall[name]).nonzero().tolist():
            expected[tuple(i)] *= min(1.0, (dampening * overall[name][tuple(i)] / f[name][tuple(i)]).item())
            chosen += 1
        assert torch.allclose(after.double(), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(
            after[f[name] < 0.999 * alpha * overall[name]], before[f[name] < 0.999 * alpha * overall[name]]
        )
    assert 100 < chosen < sum(p.numel() for p in model.parameters()) / 2


def test_a_forget_share_of_a_third_leaves_nothing_to_choose_beyond_alpha_three(taught, run):
    with pytest.raises(InputError, match=r"no weight has I_f > 10 I, .* use an alpha below 3$"):
        run(taught, method="ssd")
    run(taught, method="ssd", alpha=2.9)


def test_forget_goes_down_and_most_of_retain_stays_without_a_step(taught, run):
    model = run(taught, method="ssd", alpha=2.0, steps=0)
    forget, retain = (said(model, taught.tokenizer, of_split(taught.facts, s)) for s in ("forget", "retain"))
    assert forget.probability < 0.3 and forget.exact < 0.3
    assert retain.probability > 0.7 and retain.exact > 0.8


def test_conv1d_weights_and_tied_embeddings_are_dampened_once(toy, run):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(toy.tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
        toy.model = GPT2LMHeadModel(config)
    model = run(toy, method="ssd", alpha=1.5)
    before, after = toy.model.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight
    ratio = (after / before)[after != before]
    assert len(ratio) and (ratio < 1 / 1.5 + 1e-6).all() and (ratio >= 1 / 3 - 1e-4).all()
    ratio = (model.lm_head.weight / toy.model.lm_head.weight)[model.lm_head.weight != toy.model.lm_head.weight]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(ratio) and ratio.min() >= 1 / 3 - 1e-4, "twice would be down to a ninth"


def test_the_factor_is_at_most_one_and_one_where_nothing_is_chosen():
    forget, overall = torch.tensor([0.0, 1.0, 5.0, 5.0]), torch.tensor([0.0, 1.0, 2.0, 0.0])
    assert ssd.factor(forget, overall, 2.0, 1.0).tolist() == pytest.approx([1.0, 1.0, 0.4, 0.0])
    assert ssd.factor(forget, overall, 2.0, 100.0).tolist() == [1.0, 1.0, 1.0, 0.0]


def test_doctests():
    assert doctest.testmod(ssd).failed == 0


def test_an_empty_batch_is_refused(toy, run):
    with pytest.raises(InputError, match="at least 1, not 0"):
        run(toy, method="ssd", examples=0)
