from types import SimpleNamespace

import pytest
import torch

from lethescope.subjects.methods import graddiff
from lethescope.tokens import Encoded, collate

FORGET = collate([Encoded((1, 5, 6, 7), 2), Encoded((1, 8, 9), 2)], 0)
RETAIN = collate([Encoded((1, 2, 3), 1), Encoded((1, 4, 9, 10), 3)], 0)


def slow_nll(logits, batch):
    found = []
    for i in range(len(logits)):
        for t in range(1, logits.shape[1]):
            if batch.answer_mask[i, t]:
                found.append(-logits[i, t - 1].double().log_softmax(-1)[batch.input_ids[i, t]].item())
    return sum(found) / len(found)


@pytest.mark.parametrize(("gamma", "alpha"), [(1.0, 1.0), (0.5, 10.0), (1.0, 0.0)])
def test_loss_agrees_with_the_formula_in_a_loop(gamma, alpha):
    generator = torch.Generator().manual_seed(0)
    forget, retain = (torch.randn(2, 4, 11, generator=generator) * 3 for _ in range(2))

    def model(input_ids, **_):
        return SimpleNamespace(logits=forget if input_ids is FORGET.input_ids else retain)

    expected = -gamma * slow_nll(forget, FORGET) + alpha * slow_nll(retain, RETAIN)
    found = graddiff.loss(model, FORGET, RETAIN, gamma=gamma, alpha=alpha)
    assert found.item() == pytest.approx(expected, rel=1e-5)
