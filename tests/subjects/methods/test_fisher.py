import copy
import doctest

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lethescope.subjects.methods import fisher
from lethescope.subjects.methods.answers import nll

# No test that forget falls and retain stays: the noise never looks at the forget facts and damages both alike here.


@pytest.fixture(params=["llama", "gpt2"])
def either(toy, request):
    if request.param == "gpt2":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = GPT2Config(vocab_size=len(toy.tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
            toy.model = GPT2LMHeadModel(config).eval()
    return toy


@pytest.mark.parametrize(("power", "boost"), [(1.0, 10.0), (0.5, 1.0)])
def test_each_weight_gets_the_noise_of_the_formula(either, run, lessons_for, power, boost):
    twin, batches = copy.deepcopy(either.model).requires_grad_(True), list(lessons_for(either).once("retain", 1))
    squares = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in twin.named_parameters()}
    for batch in batches:
        twin.zero_grad()
        nll(twin, batch).backward()
        for name, p in twin.named_parameters():
            squares[name] += 0 if p.grad is None else p.grad.double() ** 2 / len(batches)
    found = run(either, method="fisher", alpha=1e-6, power=power, boost=boost, seed=3)
    generator, head = torch.Generator().manual_seed(3), either.model.get_output_embeddings().weight
    for name, before in either.model.named_parameters():
        v = 1e-6 * (1 / (squares[name] + 1e-8) ** power).clamp(max=1e3)
        if v.ndim == 2:
            incoming = 0 if ".c_" in name else 1
            v = v.mean(incoming, keepdim=True).expand(v.shape)
        v = v * (boost if v.ndim == 1 or before is head else 1)
        noise = torch.randn(before.shape, generator=generator)
        expected = before.double() + v.sqrt() * noise
        assert torch.allclose(found.get_parameter(name).double(), expected, rtol=1e-5, atol=2e-6), name


def test_the_seed_decides_and_nothing_else_does(toy, run):
    torch.manual_seed(0)
    first = run(toy, method="fisher", seed=1)
    torch.manual_seed(1)
    again, other = run(toy, method="fisher", seed=1), run(toy, method="fisher", seed=2)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in first.named_parameters())
    assert not any(torch.equal(p, other.get_parameter(name)) for name, p in first.named_parameters())


def test_the_noise_has_the_variance_it_should_have(toy, run):
    model = run(toy, method="fisher", alpha=1e-6, boost=1.0, power=0.0)
    deltas = torch.cat([(p - toy.model.get_parameter(n)).flatten() for n, p in model.named_parameters()]).double()
    assert len(deltas) > 6e4
    assert deltas.std().item() == pytest.approx(1e-3, rel=0.02) and abs(deltas.mean().item()) < 2e-5


def test_important_weights_get_less_and_none_more_than_the_cap():
    importance = torch.tensor([1e-12, 1e-4, 1e-2, 1.0, 100.0])
    spread = fisher.row_variance(importance, 2.0)
    assert spread.tolist() == pytest.approx([2000.0, 2000.0, 200.0, 2.0, 0.02], rel=1e-4)


def test_doctests():
    assert doctest.testmod(fisher).failed == 0
