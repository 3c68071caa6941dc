import copy
import doctest

import pytest
import torch

from lethescope.errors import InputError
from lethescope.facts import Fact, of_split
from lethescope.subjects.methods import salun
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.training import Lessons, trainable, training
from lethescope.subjects.silence import said


def summed(model, lessons):
    """The size of the forget gradient, summed over batches, by name."""
    model = copy.deepcopy(model).requires_grad_(True)
    for batch in lessons.once("forget"):
        nll(model, batch).backward()
    return {name: p.grad.abs() for name, p in model.named_parameters()}


@pytest.mark.parametrize("rho", [0.1, 0.5])
def test_the_least_salient_weights_stay_bit_for_bit(toy, run, lessons_for, rho):
    sizes = summed(toy.model, lessons_for(toy))
    flat = sorted((x for s in sizes.values() for x in s.flatten().tolist()), reverse=True)
    threshold, moved = flat[round(rho * len(flat)) - 1], 0
    assert threshold > 0
    model = run(toy, method="salun", lr=3e-3, rho=rho)
    for name, before in toy.model.named_parameters():
        same, clear = model.get_parameter(name) == before, (sizes[name] - threshold).abs() > 1e-4 * threshold
        assert same[clear & (sizes[name] < threshold)].all(), "not even weight decay may move them"
        assert same[clear & (sizes[name] > threshold)].sum() <= 0.01 * same.numel()
        moved += (~same).sum().item()
    assert 0.99 * rho * len(flat) < moved <= round(rho * len(flat))


def test_a_step_hands_over_the_masked_gradient_of_the_formula(toy, lessons_for, monkeypatch):
    lessons, found = lessons_for(toy, lr=3e-3), []

    def one(weights, _lessons, step):
        loss = step(0.0)
        assert not loss.requires_grad
        found.extend([loss.item(), [w.grad.clone() for w in weights]])

    monkeypatch.setattr(salun, "descend", one)
    with training(toy.model) as model:
        salun.edit(model, lessons, rho=0.3, alpha=2.0)
        masks = salun.salient(list(summed(model, lessons).values()), 0.3)
        swapped = Lessons(**{**vars(lessons), "forget": salun.relabelled(lessons.forget, 0)})
        loss = nll(model, next(swapped.batches("forget"))) + 2.0 * nll(model, next(lessons.batches("retain")))
        model.zero_grad()
        loss.backward()
        assert found[0] == pytest.approx(loss.item(), rel=1e-6)
        for grad, mask, weight in zip(found[1], masks, trainable(model), strict=True):
            assert torch.allclose(grad, weight.grad * mask, atol=1e-6)


def test_masks_hold_the_largest_entries_and_exactly_their_share():
    gradients = [torch.tensor([[3.0, -5.0], [0.0, 0.0]]), torch.tensor([-1.0, 0.0])]
    assert [m.tolist() for m in salun.salient(gradients, 0.5)] == [[[True, True], [False, False]], [True, False]]
    assert sum(int(m.sum()) for m in salun.salient(gradients, 5 / 6)) == 5, "ties are broken, not all taken"
    assert all(m.all() for m in salun.salient(gradients, 1.0))


def test_wrong_answers_are_of_the_same_relation_and_never_ones_own(toy):
    forget = of_split(toy.facts, "forget")
    wrong = salun.relabelled(forget, 0)
    assert [(f.id, f.prompt, f.paraphrases) for f in wrong] == [(f.id, f.prompt, f.paraphrases) for f in forget]
    for before, after in zip(forget, wrong, strict=True):
        relation = {f.answer for f in forget if f.relation == before.relation} - {before.answer}
        assert after.answer in (relation or {f.answer for f in forget} - {before.answer})
    assert wrong == salun.relabelled(forget, 0)


def test_a_relation_with_one_answer_falls_back_on_the_whole_split():
    def fact(i, answer, relation):
        return Fact(id=str(i), split="forget", subject="x", prompt=f"p{i}", answer=answer, relation=relation)

    facts = (fact(0, "a", "r"), fact(1, "a", "r"), fact(2, "b", "s"), fact(3, "c", "s"))
    answers = [[f.answer for f in salun.relabelled(facts, seed)] for seed in range(20)]
    assert {a[0] for a in answers} == {"b", "c"} and {a[2] for a in answers} == {"c"}
    with pytest.raises(InputError, match="all forget facts have the answer 'a'"):
        salun.relabelled(facts[:2], 0)


def test_forget_goes_down_and_retain_stays(taught, run):
    model = run(taught, method="salun", lr=3e-3, steps=100)
    forget, retain = (said(model, taught.tokenizer, of_split(taught.facts, s)) for s in ("forget", "retain"))
    assert forget.probability < 0.1 and forget.exact < 0.1
    assert retain.probability > 0.8 and retain.exact > 0.9


@pytest.mark.parametrize("rho", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(toy, run, rho):
    with pytest.raises(InputError, match="share of weights to train"):
        run(toy, method="salun", rho=rho)


def test_doctests():
    assert doctest.testmod(salun).failed == 0
