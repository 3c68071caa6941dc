import copy

import pytest
import torch

from lethescope.facts import of_split
from lethescope.subjects.methods import scrub, unlearn
from lethescope.subjects.methods.training import training
from lethescope.subjects.silence import said


def slow(start, model, batch):
    """KL(start || model) and the NLL, answer token by answer token."""
    logs = [m(**batch.inputs()).logits.detach().double().log_softmax(-1) for m in (start, model)]
    divergences, losses = [], []
    for i, t in batch.answer_mask.nonzero().tolist():
        p, q = (log[i, t - 1] for log in logs)
        divergences.append(sum((a.exp() * (a - b)).item() for a, b in zip(p, q, strict=True)))
        losses.append(-q[batch.input_ids[i, t]].item())
    return sum(divergences) / len(divergences), sum(losses) / len(losses)


def test_steps_up_and_down_take_turns_and_end_with_steps_down(toy, lessons_for, monkeypatch):
    lessons, found, start = lessons_for(toy, steps=10, lr=3e-3), [], copy.deepcopy(toy.model)

    def ten(weights, _lessons, step):
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.3)  # away from the start
        found.extend(step(i / 10).item() for i in range(10))

    monkeypatch.setattr(scrub, "descend", ten)
    with training(toy.model) as model:
        scrub.edit(model, lessons, alpha=0.7, gamma=2.0, pushing=0.6)
    f, r = lessons.batches("forget"), lessons.batches("retain")
    for i, loss in enumerate(found):
        if i in (0, 2, 4):
            expected = -slow(start, toy.model, next(f))[0]
        else:
            divergence, likelihood = slow(start, toy.model, next(r))
            expected = 2.0 * likelihood + 0.7 * divergence
        assert loss == pytest.approx(expected, rel=1e-3)


def test_without_pushing_the_forget_facts_are_never_seen(toy):
    forget, retain = (of_split(toy.facts, split) for split in ("forget", "retain"))
    models = []
    for facts in (forget, forget[:1]):
        model, settings = copy.deepcopy(toy.model), {"steps": 3, "lr": 1e-3, "progress": False, "pushing": 0.0}
        models.append(unlearn(model, facts, retain, tokenizer=toy.tokenizer, method="scrub", **settings))
    assert all(torch.equal(p, models[1].get_parameter(name)) for name, p in models[0].named_parameters())


def test_forget_goes_down_and_retain_stays(taught, run):
    model = run(taught, method="scrub", lr=3e-3, steps=60)
    forget, retain = (said(model, taught.tokenizer, of_split(taught.facts, s)) for s in ("forget", "retain"))
    assert forget.probability < 0.05 and forget.exact < 0.05
    assert retain.probability > 0.8 and retain.exact > 0.9
