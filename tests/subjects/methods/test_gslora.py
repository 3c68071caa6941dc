import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lethescope.facts import of_split
from lethescope.subjects.methods import gslora
from lethescope.subjects.methods.gradients import linear_maps, low_rank
from lethescope.subjects.methods.training import training
from lethescope.subjects.silence import said


def changed(before, after):
    return {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}


def deltas(before, after):
    """How far each block has moved."""
    moved = [0.0] * len(before.model.layers)
    for name, p in after.named_parameters():
        if "layers." in name:
            moved[int(name.split(".")[2])] += (p - before.get_parameter(name)).square().sum().item()
    return moved


def test_the_bounded_term_stops_at_the_bound(loops):
    model = loops.fixed(0)
    loss = loops.nll(model, loops.forget)
    assert gslora.bounded(model, loops.forget, loss + 2.5).item() == pytest.approx(2.5, rel=1e-5)
    above = gslora.bounded(model, loops.forget, loss - 1.0)
    assert above.item() == 0 and not any(any(row) for row in loops.gradients(above, model, loops.forget))
    gslora.bounded(model, loops.forget, 100.0).backward()
    touched = model.leaf(loops.forget).grad.abs().sum(-1) > 0
    assert torch.equal(touched[:, :-1], loops.forget.answer_mask[:, 1:]) and not touched[:, -1].any()


def test_a_blocks_norm_is_that_of_all_its_factors(toy):
    model = toy.model.requires_grad_(True)
    with low_rank(model, linear_maps(model), rank=2) as factors:
        for f in factors:
            torch.nn.init.normal_(f.b, generator=torch.Generator().manual_seed(f.map.block))
        found = [norm.item() for norm in gslora.block_norms(factors)]
        expected = [
            sum(x**2 for f in factors if f.map.block == b for p in (f.a, f.b) for x in p.flatten().tolist()) ** 0.5
            for b in (0, 1)
        ]
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 2


@pytest.mark.parametrize("done", [0.0, 0.5])
def test_a_step_is_the_formula_and_its_norms_wait_for_the_warm_up(toy, lessons_for, monkeypatch, done, loops):
    lessons, found = lessons_for(toy, lr=1e-2), []

    def one(weights, _lessons, step):
        norms = [sum(w.square().sum().item() for w in weights[i : i + 6]) ** 0.5 for i in (0, 6)]
        found.append((step(done).item(), sum(norms), len(weights)))

    monkeypatch.setattr(gslora, "descend", one)
    with training(toy.model) as model:
        gslora.edit(model, lessons, bound=20.0, beta=0.3, alpha=0.7, warm=0.2)
    loss, norms, count = found[0]
    f, r = (loops.nll(toy.model, next(lessons.batches(split))) for split in ("forget", "retain"))
    assert count == 12 and norms > 1
    assert loss == pytest.approx(0.3 * (20.0 - f) + r + (0.7 * norms if done else 0.0), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_mlps_change(toy, run, kind):
    if kind == "gpt2":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = GPT2Config(vocab_size=len(toy.tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
            toy.model = GPT2LMHeadModel(config).eval()
    names = changed(toy.model, run(toy, method="gslora", lr=2e-2))
    assert len(names) == (6 if kind == "llama" else 4)
    assert all(".mlp." in name and name.endswith(".weight") for name in names)


def test_the_norms_weight_keeps_blocks_near_where_they_were(taught, run):
    free, held = (run(taught, method="gslora", lr=2e-2, alpha=alpha, warm=0.0, steps=40) for alpha in (0.0, 1.0))
    assert sum(deltas(taught.model, held)) < 0.5 * sum(deltas(taught.model, free))


def test_forget_goes_down_and_retain_stays(taught, run):
    model = run(taught, method="gslora", lr=2e-2, steps=60)
    forget, retain = (said(model, taught.tokenizer, of_split(taught.facts, s)) for s in ("forget", "retain"))
    assert forget.probability < 0.05 and forget.exact < 0.05
    assert retain.probability > 0.8 and retain.exact > 0.9


def test_the_seed_decides(toy, run):
    first, again, other = (run(toy, method="gslora", lr=2e-2, seed=seed) for seed in (0, 0, 1))
    assert not changed(first, again) and changed(first, other)
