"""Tests of counting passes: reading and training are told apart, and nothing is counted afterwards."""

import torch

from lethescope.cost import counting


def test_reading_and_training_are_counted_apart(make_model):
    model = make_model()
    ids = torch.tensor([[1, 5, 6]])
    with counting() as cost:
        with torch.no_grad():
            model.module(ids)
            model.module(ids)
        model.module(ids).logits.sum()
    assert (cost.forward_passes, cost.backward_passes) == (3, 1) and cost.seconds > 0
    model.module(ids)
    assert cost.forward_passes == 3
