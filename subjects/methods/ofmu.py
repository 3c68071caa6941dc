"""OFMU, two-level unlearning with a penalty (Asif and Amiri 2025, arXiv:2509.22483)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lethescope.errors import InputError
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.gradients import combine, dot, gradient, hand_over
from lethescope.subjects.methods.training import Lessons, descend, trainable
from lethescope.tokens import Batch

TINY = 1e-12


def edit(
    model: Any,
    lessons: Lessons,
    *,
    beta: float = 0.1,
    rho: float = 1e-3,
    inner: int = 1,
    reach: float = 1e-5,
) -> None:
    """In each step climb Phi `inner` times, then descend along grad L_r + 2 rho_k H_Phi grad Phi.

    Phi = L_f - beta cos(grad L_f, grad L_r), with L the NLL: the inner level forgets where that does not run along with
    retaining. The second term of the outer step is the gradient of the penalty rho_k |grad Phi|^2, which holds the
    model near a point where the inner level has nothing left to climb.

    We found no public code, nor beta, rho and the number of inner steps. Our choices: the defaults; rho_k grows in a
    line from rho to 2 rho; the inner climb has an AdamW of its own, without weight decay, whose learning rate falls in
    a line from the lessons' own; the product H_Phi v is a central finite difference (`hessian_product`), since grad Phi
    has second derivatives in it already. Those need eager attention, which is set for the while. A step differentiates
    `inner` + 3 times twice.

    L_f has no upper bound, so a long run breaks the model; and a stationary point of Phi says nothing on what is held.

    Args:
        model: the model, edited in place.
        lessons: facts, steps and learning rate.
        beta: weight of the cosine.
        rho: weight of the penalty at the first step.
        inner: steps up Phi in each step.
        reach: length of the finite difference, as a share of the weights' norm. On a two-layer model that knows its
            facts by heart the product is 0.1 % off with 1e-5, and half of it is wrong with 1e-3.

    Raises:
        InputError: the weights are too coarse for a finite difference.
    """
    weights = trainable(model)
    if any(weight.dtype == torch.bfloat16 for weight in weights):
        raise InputError("OFMU takes finite differences, which bfloat16 rounds away; use float32: model.float()")
    forget, retain = lessons.batches("forget"), lessons.batches("retain")
    climber = torch.optim.AdamW(weights, lr=lessons.lr, weight_decay=0.0, maximize=True)

    def step(done: float) -> Tensor:
        f, r = next(forget), next(retain)
        climber.param_groups[0]["lr"] = lessons.lr * (1 - done)
        for _ in range(inner):
            _climb(climber, weights, phi_gradient(model, f, r, weights, beta))
        slope = phi_gradient(model, f, r, weights, beta)
        pull = hessian_product(lambda: phi_gradient(model, f, r, weights, beta), weights, slope, reach)
        loss = nll(model, r)
        hand_over(weights, combine(1.0, gradient(loss, weights), 2 * rho * (1 + done), pull))
        return loss.detach()

    with eager(model):
        descend(weights, lessons, step)


def phi_gradient(model: Any, forget: Batch, retain: Batch, weights: Sequence[Tensor], beta: float) -> list[Tensor]:
    """Return the gradient of L_f - beta cos(grad L_f, grad L_r), by differentiating twice.

    Args:
        model: a model whose attention can be differentiated twice (`eager`).
        forget: a batch of forget facts.
        retain: a batch of retain facts.
        weights: weights of the model.
        beta: weight of the cosine.
    """
    loss = nll(model, forget)
    f, r = gradient(loss, weights, keep=True), gradient(nll(model, retain), weights, keep=True)
    return gradient(loss - beta * dot(f, r) / (dot(f, f) * dot(r, r)).clamp(min=TINY).sqrt(), weights)


def hessian_product(
    slope: Callable[[], list[Tensor]], weights: Sequence[Tensor], direction: Sequence[Tensor], reach: float
) -> list[Tensor]:
    """Return H v as (slope(w + h v) - slope(w - h v)) / 2h, with h |v| = reach |w|; the weights are put back.

    >>> w = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
    >>> hessian_product(lambda: [w[0] * torch.tensor([3.0, 5.0])], w, [torch.tensor([1.0, 1.0])], 1e-3)
    [tensor([3.0000, 5.0000], dtype=torch.float64)]

    Args:
        slope: gives the gradient at the weights as they are.
        weights: moved back and forth.
        direction: v.
        reach: see above; too large and the curve bends, too small and rounding shows.
    """
    h = reach * (dot(weights, weights) / dot(direction, direction).clamp(min=TINY)).sqrt().item()
    start = [weight.detach().clone() for weight in weights]
    ends = []
    for side in (h, -h):
        _set(weights, combine(1.0, start, side, direction))
        ends.append(slope())
    _set(weights, start)
    return combine(0.5 / h, ends[0], -0.5 / h, ends[1])


@contextmanager
def eager(model: Any) -> Generator[None]:
    """Make a model's attention one that can be differentiated twice; afterwards put its own back."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _climb(climber: torch.optim.Optimizer, weights: Sequence[nn.Parameter], slope: Sequence[Tensor]) -> None:
    hand_over(weights, slope)
    nn.utils.clip_grad_norm_(weights, 1.0)
    climber.step()


def _set(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
