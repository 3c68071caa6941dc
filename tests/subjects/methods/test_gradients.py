import copy
import doctest

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lethescope.errors import InputError
from lethescope.subjects.methods import gradients
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.gradients import (
    combine,
    dot,
    gradient,
    hand_over,
    linear_maps,
    low_rank,
    mean_square,
    trained,
    variance,
)
from lethescope.subjects.methods.training import trainable


@pytest.fixture
def gpt2(toy):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(toy.tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
        return GPT2LMHeadModel(config).eval()


def test_dot_and_combine_are_those_of_one_long_vector():
    generator = torch.Generator().manual_seed(0)
    a, b = ([torch.randn(shape, generator=generator) for shape in ((3,), (2, 4))] for _ in range(2))
    flat = [torch.cat([x.flatten() for x in side]) for side in (a, b)]
    assert dot(a, b).item() == pytest.approx((flat[0] @ flat[1]).item(), rel=1e-6)
    mixed = torch.cat([x.flatten() for x in combine(2.0, a, torch.tensor(-3.0), b)])
    assert torch.allclose(mixed, 2 * flat[0] - 3 * flat[1])


def test_gradient_agrees_with_backward_and_is_zero_where_nothing_depends():
    weights = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(3))]
    found = gradient(weights[0].square().sum(), weights)
    assert found[0].tolist() == [2.0, 4.0] and found[1].tolist() == [0.0, 0.0, 0.0]
    hand_over(weights, found)
    assert weights[0].grad.tolist() == [2.0, 4.0]


@pytest.mark.parametrize(("size", "by_tokens"), [(1, False), (5, True), (5, False)])
def test_importance_agrees_with_a_loop_over_backward_passes(toy, lessons_for, size, by_tokens):
    weights = trainable(toy.model.requires_grad_(True))
    lessons, grads, shares = lessons_for(toy), [], []
    for batch in lessons.once("forget", size):
        toy.model.zero_grad()
        nll(toy.model, batch).backward()
        grads.append([torch.zeros_like(w) if w.grad is None else w.grad.double() for w in weights])
        shares.append(float(batch.answer_mask.sum()) if by_tokens else 1.0)
    assert size == 1 or not by_tokens or len(set(shares)) > 1
    squares = mean_square(toy.model, lessons.once("forget", size), weights, by_tokens=by_tokens)
    spread = variance(toy.model, lessons.once("forget", size), weights, by_tokens=by_tokens)
    for i in range(len(weights)):
        mean = sum(s * g[i] for s, g in zip(shares, grads, strict=True)) / sum(shares)
        second = sum(s * g[i] ** 2 for s, g in zip(shares, grads, strict=True)) / sum(shares)
        assert torch.allclose(squares[i].double(), second, rtol=1e-4, atol=1e-12)
        assert torch.allclose(spread[i].double(), second - mean**2, rtol=1e-3, atol=1e-9)


def test_tied_embeddings_are_one_weight(toy):
    weights = trainable(toy.model.requires_grad_(True))
    assert toy.model.get_input_embeddings().weight is toy.model.get_output_embeddings().weight
    assert sum(w is toy.model.get_output_embeddings().weight for w in weights) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_factors_are_applied_merged_and_gone(toy, lessons_for, gpt2, kind):
    model = (toy.model if kind == "llama" else gpt2).requires_grad_(True)
    maps, batch = linear_maps(model), next(lessons_for(toy).once("forget", 4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = model(**batch.inputs()).logits.detach()
    with low_rank(model, maps, rank=3, scale=0.5, seed=1) as factors:
        assert torch.equal(model(**batch.inputs()).logits, logits), "B is 0 at first"
        assert set(trainable(model)) == set(trained(factors))
        deltas = {}
        for f in factors:
            nn.init.normal_(f.b, generator=torch.Generator().manual_seed(0))
            deltas[f.map.name] = (f.scale * f.b @ f.a).detach()
            assert f.scale == pytest.approx(0.5) and f.a.shape[0] == 3
        changed = model(**batch.inputs()).logits.detach()
    assert not torch.allclose(changed, logits, atol=1e-3)
    assert torch.allclose(model(**batch.inputs()).logits, changed, atol=1e-4)
    assert {name for name, _ in model.named_parameters()} == before.keys()
    assert all(p.requires_grad for p in model.parameters())
    for m in maps:
        old = m.turned(before[f"{m.name}.weight"])
        assert torch.allclose(m.weight, old + deltas[m.name], atol=1e-5)
    others = before.keys() - {f"{m.name}.weight" for m in maps}
    assert all(torch.equal(before[name], model.get_parameter(name)) for name in others)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_new_start_leaves_the_model_as_it_was(toy, lessons_for, gpt2, kind):
    model = (toy.model if kind == "llama" else gpt2).requires_grad_(True)
    batch, generator = next(lessons_for(toy).once("forget", 4)), torch.Generator().manual_seed(0)
    logits = model(**batch.inputs()).logits.detach()
    with low_rank(model, linear_maps(model), rank=4) as factors:
        for f in factors:
            f.start_from(*(torch.randn(p.shape, generator=generator) * 0.1 for p in (f.a, f.b)))
        bare = factors[0].map.weight.detach().clone()
        assert torch.allclose(model(**batch.inputs()).logits, logits, atol=1e-4)
    assert not torch.allclose(factors[0].map.weight, bare, atol=1e-3)
    assert torch.allclose(model(**batch.inputs()).logits, logits, atol=1e-4)


def test_maps_are_those_of_trained_blocks_and_never_the_unembedding(toy):
    toy.model.requires_grad_(False)
    toy.model.model.layers[1].requires_grad_(True)
    maps = linear_maps(toy.model)
    assert len(maps) == 7 and {m.block for m in maps} == {1}
    assert all(m.name.startswith("model.layers.1.") for m in maps)


def test_a_rank_that_does_not_fit_is_refused_before_anything_is_changed(toy):
    maps, before = linear_maps(toy.model.requires_grad_(True)), copy.deepcopy(toy.model.state_dict())
    message = r"rank 25 does not fit model\.layers\.0\.self_attn\.k_proj; use 1 to 24"
    with pytest.raises(InputError, match=message), low_rank(toy.model, maps, rank=25):
        pass
    with pytest.raises(InputError, match="no linear map"), low_rank(toy.model, []):
        pass
    assert all(torch.equal(before[name], tensor) for name, tensor in toy.model.state_dict().items())


def test_doctests():
    assert doctest.testmod(gradients).failed == 0
