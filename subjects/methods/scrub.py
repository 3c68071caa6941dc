"""SCRUB (Kurmanji et al. 2023, arXiv:2302.09880): by turns away from the start on forget, towards it on retain."""

from __future__ import annotations

from itertools import count
from typing import Any

from torch import Tensor

from lethescope.subjects.methods.answers import kl, nll
from lethescope.subjects.methods.training import Lessons, descend, frozen_copy, trainable


def edit(model: Any, lessons: Lessons, *, alpha: float = 0.5, gamma: float = 1.0, pushing: float = 0.6) -> None:
    """Take by turns a step up KL on forget and a step down gamma NLL + alpha KL on retain, KL = KL(start || model).

    After the share `pushing` of the steps all are steps down, so that what the pushing broke is mended. The paper takes
    turns epoch by epoch, 3 of 5 with pushing; our choice is to take them step by step, with the divergences taken over
    answer positions. The push has no bound: a model that is far from its start need not have forgotten anything.

    Args:
        model: the model, edited in place.
        lessons: facts, steps and learning rate.
        alpha: weight of the divergence on retain.
        gamma: weight of the retain facts' NLL.
        pushing: share of the steps in which forget and retain take turns (0 to 1).
    """
    start, turns = frozen_copy(model), count()
    forget, retain = lessons.batches("forget"), lessons.batches("retain")

    def step(done: float) -> Tensor:
        if next(turns) % 2 == 0 and done < pushing:
            return -kl(start, model, next(forget))
        batch = next(retain)
        return gamma * nll(model, batch) + alpha * kl(start, model, batch)

    descend(trainable(model), lessons, step)
