import copy

import pytest
import torch

from lethescope.subjects.methods import taskvector
from lethescope.subjects.methods.answers import nll


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("scale", [5.0, 0.5, -1.0])
def test_every_weight_goes_as_far_the_other_way(toy, run, scale):
    start = weights(toy.model)
    overfit = weights(run(toy, method="graddiff", gamma=-1.0, alpha=0.0))  # plain fine-tuning on the same batches
    found = weights(run(toy, method="taskvector", scale=scale))
    for name, theta in start.items():
        assert not torch.equal(overfit[name], theta)
        assert torch.allclose(found[name], theta - scale * (overfit[name] - theta), rtol=0, atol=1e-6)


def test_no_way_to_go_leaves_the_model_as_it_was(toy, run):
    found = weights(run(toy, method="taskvector", scale=0.0))
    assert all(torch.equal(found[name], theta) for name, theta in weights(toy.model).items())


def test_the_same_seed_gives_the_same_weights(toy, run):
    first, again, other = (weights(run(toy, method="taskvector", seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_only_the_blocks_asked_for_change(toy, run):
    found, start = weights(run(toy, method="taskvector", blocks=[1])), weights(toy.model)
    changed = {name for name in start if not torch.equal(found[name], start[name])}
    assert changed and all(".layers.1." in name for name in changed)


def test_forget_loss_goes_up_where_fine_tuning_would_bring_it_down(toy, run, lessons_for):
    lessons = lessons_for(toy, batch_size=32)
    batch = next(lessons.once("forget"))
    losses = [nll(run(toy, method="taskvector", scale=s), batch).item() for s in (-1.0, 0.0, 1.0)]
    assert losses[0] < losses[1] < losses[2]


def test_the_retain_facts_are_never_read(toy, lessons_for):
    lessons = lessons_for(toy)
    again, first = lessons_for(toy), copy.deepcopy(toy.model)
    object.__setattr__(again, "retain", ())
    second = copy.deepcopy(toy.model)
    taskvector.edit(first, lessons)
    taskvector.edit(second, again)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
