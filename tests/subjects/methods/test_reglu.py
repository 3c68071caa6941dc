import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.subjects.methods import reglu
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.gradients import linear_maps, low_rank
from lethescope.subjects.methods.training import training
from lethescope.subjects.methods.vila import inverted_hinge
from lethescope.subjects.silence import said


@pytest.fixture(params=["llama", "gpt2"])
def either(toy, request):
    if request.param == "gpt2":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = GPT2Config(vocab_size=len(toy.tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
            toy.model = GPT2LMHeadModel(config).eval()
    return toy


def test_outputs_are_summed_where_answers_are_predicted_and_padding_does_not_matter(either, lessons_for):
    model, lessons = either.model.requires_grad_(True), lessons_for(either)
    maps, batch = linear_maps(model), next(lessons.batches("forget"))
    found = reglu.outputs(model, maps, [batch])
    assert not found[0].requires_grad and found[0].shape == (8, maps[0].weight.shape[0])
    seen = {}
    handles = [
        m.module.register_forward_hook(lambda _m, _i, out, k=k: seen.update({k: out})) for k, m in enumerate(maps)
    ]
    for row in range(8):
        alone = slice(row, row + 1), slice(0, int(batch.attention_mask[row].sum()))
        model(input_ids=batch.input_ids[alone])
        for k, sums in enumerate(found):
            at = [t - 1 for t in batch.answer_mask[row].nonzero().flatten().tolist()]
            assert torch.allclose(sums[row], sum(seen[k][0, t] for t in at), atol=1e-4)
    for handle in handles:
        handle.remove()


def test_directions_are_the_leading_eigenvectors():
    generator = torch.Generator().manual_seed(0)
    forget, retain = torch.randn(7, 10, generator=generator), torch.randn(9, 10, generator=generator)
    q, q_r = reglu.directions(forget, retain, 0.7, 3, 128)
    f, r = (sum(torch.outer(row, row) for row in h.double()) / len(h) + 1e-4 * torch.eye(10) for h in (forget, retain))
    for vectors, matrix in ((q.double(), 0.3 * f - 0.7 * r), (q_r.double(), r)):
        values = (vectors * (matrix @ vectors)).sum(0)
        assert torch.allclose(matrix @ vectors, vectors * values, atol=1e-5)
        assert torch.allclose(vectors.T @ vectors, torch.eye(vectors.shape[1], dtype=torch.float64), atol=1e-5)
        everything = torch.linalg.eigvalsh(matrix).flip(0)
        assert torch.allclose(values, everything[: len(values)], atol=1e-5)
    assert q.shape == (10, 3) and q_r.shape == (10, 5), "half of the outputs at most"


def test_without_retain_they_find_where_forget_is_and_with_it_what_is_its_own():
    shared, own = torch.eye(6)[0], torch.eye(6)[1]
    forget, retain = torch.stack([3 * shared, own, 3 * shared + own]), torch.stack([3 * shared] * 3)
    first = reglu.directions(forget, retain, 0.0, 1, 1)[0][:, 0]
    assert abs(first @ shared) > 0.9
    q, q_r = reglu.directions(forget, retain, 0.7, 1, 1)
    assert abs(q[:, 0] @ own) > 0.9 and abs(q_r[:, 0] @ shared) > 0.999
    assert reglu.directions(forget, retain, 0.7, 1, 3)[1].shape == (6, 1), "no arbitrary direction beside it"


def test_the_model_starts_as_it_was_with_factors_in_their_directions(either, lessons_for, monkeypatch):
    lessons, found = lessons_for(either, lr=2e-2), []
    batch = next(lessons.batches("forget"))
    logits, before = either.model(**batch.inputs()).logits.detach(), copy.deepcopy(either.model)
    maps = linear_maps(before.requires_grad_(True))

    def look(weights, _lessons, step):
        assert torch.allclose(either.model(**batch.inputs()).logits, logits, atol=1e-4)
        for m, a, b in zip(maps, weights[::2], weights[1::2], strict=True):
            assert torch.allclose(b.mT @ b, torch.eye(8), atol=1e-5)
            assert torch.allclose(a, b.mT @ m.weight, atol=1e-5)
        found.append((step(0.0).item(), [w.detach().clone() for w in weights[1::2]]))

    monkeypatch.setattr(reglu, "descend", look)
    with training(either.model) as model:
        reglu.edit(model, lessons, penalty=0.6, alpha=2.0)
    assert torch.allclose(either.model(**batch.inputs()).logits, logits, atol=1e-4)
    loss, bs = found[0]
    seen = [reglu.outputs(before, maps, [lessons.collate(lessons.examples(split))]) for split in ("forget", "retain")]
    leak = 0.0
    for f, r, b in zip(*seen, bs, strict=True):
        q_r = reglu.directions(f, r, 0.7, 8, 128)[1]
        leak += sum(x**2 for x in (b.T @ q_r).flatten().tolist())
    terms = inverted_hinge(before, batch) + 2.0 * nll(before, next(lessons.batches("retain")))
    assert leak > 0.1
    assert loss == pytest.approx(terms.item() + 0.6 * leak, rel=1e-3)


def test_leak_is_zero_at_a_right_angle_and_the_rank_inside(toy):
    model = toy.model.requires_grad_(True)
    with low_rank(model, linear_maps(model)[:1], rank=3) as factors, torch.no_grad():
        factors[0].b.copy_(torch.eye(48)[:, :3])
        assert reglu.leak(factors, [torch.eye(48)[:, 3:20]]).item() == 0
        assert reglu.leak(factors, [torch.eye(48)[:, :20]]).item() == 3


def test_the_penalty_keeps_factors_out_of_retain_directions(taught, run, monkeypatch):
    leaks, real = [], reglu.leak

    def watched(factors, avoided):
        leaks[-1] = real(factors, avoided)
        return leaks[-1]

    monkeypatch.setattr(reglu, "leak", watched)
    for penalty in (0.0, 0.5):
        leaks.append(None)
        run(taught, method="reglu", lr=2e-2, penalty=penalty, steps=20)
    assert leaks[1].item() < 0.5 * leaks[0].item()


def test_forget_goes_down_and_retain_stays(taught, run):
    model = run(taught, method="reglu", lr=2e-2, steps=60)
    forget, retain = (said(model, taught.tokenizer, of_split(taught.facts, s)) for s in ("forget", "retain"))
    assert forget.probability < 0.05 and forget.exact < 0.05
    assert retain.probability > 0.8 and retain.exact > 0.9


def test_the_seed_decides(toy, run):
    first, again, other = (run(toy, method="reglu", lr=2e-2, seed=seed, examples=5) for seed in (0, 0, 1))
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in first.named_parameters())
    assert not torch.equal(first.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_no_example_at_all_is_refused(toy, run):
    with pytest.raises(InputError, match="at least 1, not 0"):
        run(toy, method="reglu", examples=0)
