import copy
import doctest
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.models import anatomy
from lethescope.subjects.methods import fit, npo, unlearn
from lethescope.subjects.methods.answers import kl, nll
from lethescope.subjects.methods.training import frozen_copy, training
from lethescope.subjects.silence import said


@pytest.fixture(params=["llama", "gpt2"])
def either(toy, request):
    if request.param == "gpt2":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = GPT2Config(vocab_size=len(toy.tokenizer), n_embd=32, n_layer=3, n_head=2, n_positions=64)
            toy.model = GPT2LMHeadModel(config).eval()
    return toy


def test_importance_is_the_norm_of_the_embedding_gradients_whatever_the_batches(either, lessons_for):
    lessons, caught = lessons_for(either), []

    def catch(_module, _args, output):
        output.retain_grad()
        caught.append(output)

    handle = either.model.get_input_embeddings().register_forward_hook(catch)
    everything = lessons.collate(lessons.examples("forget"))
    nll(either.model.requires_grad_(True), everything).backward()
    handle.remove()
    expected = sum(x**2 for x in caught[0].grad.double().flatten().tolist()) ** 0.5
    assert expected > 0.1
    for size in (1, 8, 100):
        assert fit.importance(either.model, lessons_for(either, batch_size=size)) == pytest.approx(expected, rel=1e-4)


def test_blocks_come_in_the_order_of_what_their_absence_changes(either, lessons_for):
    lessons = lessons_for(either)
    everything = lessons.collate(lessons.examples("forget"))
    before, changes = nll(either.model, everything).item(), []
    for i in range(len(anatomy(either.model).blocks)):
        without = copy.deepcopy(either.model)
        for p in anatomy(without).blocks[i].parameters():
            p.data.zero_()
        changes.append(abs(nll(without, everything).item() - before))
    order, kept = fit.attributed(either.model, lessons), copy.deepcopy(either.model.state_dict())
    assert order == [i for i, _ in sorted(enumerate(changes), key=lambda pair: -pair[1])]
    assert min(abs(a - b) for i, a in enumerate(changes) for b in changes[:i]) > 1e-6, "no ties"
    assert all(torch.equal(kept[name], tensor) for name, tensor in either.model.state_dict().items())


def test_weights_come_back_after_an_error(toy):
    before = copy.deepcopy(toy.model.state_dict())
    with pytest.raises(ZeroDivisionError), fit.zeroed(toy.model.model.layers[0]):
        assert not any(p.any() for p in toy.model.model.layers[0].parameters())
        raise ZeroDivisionError
    assert all(torch.equal(before[name], tensor) for name, tensor in toy.model.state_dict().items())


@pytest.mark.parametrize(("low", "high", "way"), [(0.0, 0.0, "npo+kl"), (0.0, 1e9, "npo"), (1e9, 1e9, "random")])
def test_importance_chooses_the_loss(taught, lessons_for, monkeypatch, low, high, way):
    lessons, found = lessons_for(taught, lr=3e-3), []

    def one(weights, _lessons, step):
        with torch.no_grad():
            weights[0].add_(0.1)  # away from the start
        found.append(step(0.0).item())

    monkeypatch.setattr(fit, "descend", one)
    with training(taught.model) as model:
        start = frozen_copy(model)
        fit.edit(model, lessons, low=low, high=high, beta=0.2, alpha=3.0)
    f, r = next(lessons.batches("forget")), next(lessons.batches("retain"))
    pushed = npo.loss(taught.model, f, r, start=start, beta=0.2, alpha=0.0).item()
    kept = kl(start, taught.model, r).item()
    assert kept > 1e-3
    random = fit.random_nll(taught.model, f, torch.Generator().manual_seed(0)).item()
    expected = {"npo+kl": pushed + 3.0 * kept, "npo": pushed, "random": random}
    assert found[0] == pytest.approx(expected[way], rel=1e-4)
    assert len({round(x, 4) for x in expected.values()}) == 3


def test_random_labels_agree_with_a_loop_and_never_touch_prompts(loops):
    model, generator = loops.fixed(0), torch.Generator().manual_seed(4)
    labels = torch.randint(11, (3,), generator=generator).tolist()
    logits = [z for answer in loops.answers(model, loops.forget) for z, _ in answer]
    expected = [-torch.tensor(loops.softmax(z)[y]).log().item() for z, y in zip(logits, labels, strict=True)]
    found = fit.random_nll(model, loops.forget, torch.Generator().manual_seed(4))
    assert found.item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    found.backward()
    touched = model.leaf(loops.forget).grad.abs().sum(-1) > 0
    assert torch.equal(touched[:, :-1], loops.forget.answer_mask[:, 1:]) and not touched[:, -1].any()


def test_only_the_chosen_blocks_are_trained(toy, run, lessons_for):
    chosen = fit.attributed(toy.model, lessons_for(toy))[0]
    model = run(toy, method="fit", lr=3e-3, top=1)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, toy.model.get_parameter(n))}
    assert changed and all(name.startswith(f"model.layers.{chosen}.") for name in changed)


def test_forget_goes_down_and_with_the_kl_retain_stays(taught, run):
    model = run(taught, method="fit", lr=3e-3, steps=60, high=0.0, alpha=5.0)
    forget, retain = (said(model, taught.tokenizer, of_split(taught.facts, s)) for s in ("forget", "retain"))
    assert forget.probability < 0.05 and forget.exact < 0.05
    assert retain.probability > 0.75 and retain.exact > 0.9


def test_requests_follow_one_another_from_where_the_last_one_ended(toy):
    forget, retain = (of_split(toy.facts, split) for split in ("forget", "retain"))
    parts = [tuple(f for f in forget if f.subject == s) for s in dict.fromkeys(f.subject for f in forget)]
    settings = {"tokenizer": toy.tokenizer, "steps": 3, "lr": 1e-3, "progress": False, "high": 0.0}
    model, twin, seen = copy.deepcopy(toy.model), copy.deepcopy(toy.model), []
    for given in fit.requests(model, parts, retain, seed=5, **settings):
        assert given is model
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert len(seen) == len(parts) == 2
    for i, part in enumerate(parts):
        unlearn(twin, part, retain, method="fit", seed=5 + i, **settings)
        assert all(torch.equal(p, seen[i][n]) for n, p in twin.named_parameters())


def test_scores_are_one_at_the_reference_and_symmetric_around_it():
    for score in (fit.forget_degree, fit.retain_utility):
        assert score(40.0, 40.0) == pytest.approx(1.0)
        assert score(30.0, 40.0) == pytest.approx(score(50.0, 40.0)) == pytest.approx(0.75)
        assert score(0.0, 40.0) == score(1000.0, 40.0) == pytest.approx(0.0)
        with pytest.raises(InputError, match=r"Q\* is 0.0"):
            score(1.0, 0.0)


def test_doctests():
    found = doctest.testmod(fit)
    assert found.failed == 0 and found.attempted >= 3


def test_a_callable_is_enough_for_the_random_labels():
    logits = torch.zeros(1, 2, 5)
    batch = SimpleNamespace(inputs=dict, answer_mask=torch.tensor([[False, True]]))
    found = fit.random_nll(lambda **_: SimpleNamespace(logits=logits), batch, torch.Generator())
    assert found.item() == pytest.approx(torch.tensor(5.0).log().item())


def test_blocks_that_are_not_open_to_training_are_passed_over(toy, run, lessons_for):
    closed = fit.attributed(toy.model, lessons_for(toy))[0]
    model = run(toy, method="fit", lr=3e-3, top=1, blocks=(1 - closed,))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, toy.model.get_parameter(n))}
    assert changed and all(name.startswith(f"model.layers.{1 - closed}.") for name in changed)


def test_no_block_at_all_is_refused(toy, run):
    with pytest.raises(InputError, match="number of blocks to train, at least 1, not 0"):
        run(toy, method="fit", top=0)
