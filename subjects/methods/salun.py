"""SalUn, saliency-masked random labels (Fan et al. 2023, arXiv:2310.12508)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lethescope.errors import InputError
from lethescope.facts import Fact, Facts
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.gradients import gradient, hand_over
from lethescope.subjects.methods.training import Lessons, descend, trainable


def edit(model: Any, lessons: Lessons, *, rho: float = 0.5, alpha: float = 1.0) -> None:
    """Descend on NLL(y') + alpha NLL(y_r), y' a wrong answer to a forget prompt, in the most salient weights only.

    Saliency is the size of the gradient of the forget facts' NLL, summed over their batches, at the start; the share
    rho of all weights where it is largest is trained. All others stay bit for bit as they were: they get no gradient,
    and what weight decay does to them is undone before the next step. Our choice for a language model: y' is one fixed
    answer of another forget fact (`relabelled`), where the paper draws a class at random each time.

    The model is taught to say something else, which is the plainest way to stop saying a thing without forgetting it.

    Args:
        model: the model, edited in place.
        lessons: facts, steps and learning rate.
        rho: share of the weights that may change (0 to 1).
        alpha: weight of the retain term.

    Raises:
        InputError: rho is not above 0 and at most 1, or the forget facts share one answer.
    """
    if not 0 < rho <= 1:
        raise InputError(f"rho is the share of weights to train, above 0 and at most 1, not {rho}")
    weights = trainable(model)
    wrong = replace(lessons, forget=relabelled(lessons.forget, lessons.seed)).batches("forget")
    retain, masks = lessons.batches("retain"), salient(_saliency(model, lessons, weights), rho)
    start = [weight.detach().clone() for weight in weights]

    def step(_done: float) -> Tensor:
        _put_back(weights, start, masks)
        loss = nll(model, next(wrong)) + alpha * nll(model, next(retain))
        hand_over(weights, [g * mask for g, mask in zip(gradient(loss, weights), masks, strict=True)])
        return loss.detach()

    descend(weights, lessons, step)
    _put_back(weights, start, masks)


def salient(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Return masks, true at the share rho of all entries where a gradient is largest in size.

    >>> salient([torch.tensor([3.0, -4.0]), torch.tensor([[0.5, 1.0]])], 0.5)
    [tensor([True, True]), tensor([[False, False]])]
    """
    flat = torch.cat([g.abs().flatten() for g in gradients])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(round(rho * len(flat))).indices] = True
    parts = chosen.split([g.numel() for g in gradients])
    return [part.reshape(g.shape) for part, g in zip(parts, gradients, strict=True)]


def relabelled(facts: Facts, seed: int) -> Facts:
    """Return the facts with each other's answers: of the same relation if one differs, else of any fact.

    Answers are drawn, not permuted, so that no fact keeps its own.

    Args:
        facts: the facts; not changed.
        seed: decides which answer each one gets.

    Returns:
        The facts in their order, all with wrong answers.

    Raises:
        InputError: all facts have the same answer.
    """
    rng = np.random.default_rng([seed, 4])
    return tuple(_with_wrong_answer(fact, facts, rng) for fact in facts)


def _with_wrong_answer(fact: Fact, facts: Facts, rng: np.random.Generator) -> Fact:
    others = [f for f in facts if f.answer != fact.answer]
    if not others:
        raise InputError(f"all forget facts have the answer {fact.answer!r}; SalUn needs a second one to swap it for")
    alike = [f for f in others if f.relation == fact.relation] or others
    return fact.model_copy(update={"answer": alike[rng.integers(len(alike))].answer, "alternatives": ()})


def _saliency(model: Any, lessons: Lessons, weights: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    total = [torch.zeros_like(weight) for weight in weights]
    for batch in lessons.once("forget"):
        for tensor, found in zip(total, gradient(nll(model, batch), weights), strict=True):
            tensor += found
    return total


def _put_back(weights: Sequence[Tensor], start: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for weight, before, mask in zip(weights, start, masks, strict=True):
            weight.copy_(torch.where(mask, weight, before))
