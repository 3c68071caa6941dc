"""GS-LoRA, group-sparse low-rank adapters (Zhao et al. 2024, arXiv:2403.11530)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.gradients import Factors, linear_maps, low_rank, trained
from lethescope.subjects.methods.training import LORA_RANK, Lessons, descend
from lethescope.tokens import Batch


def edit(
    model: Any,
    lessons: Lessons,
    *,
    rank: int = LORA_RANK,
    bound: float = 10.0,
    beta: float = 0.15,
    alpha: float = 0.01,
    warm: float = 0.2,
) -> None:
    """Train factors in the MLPs on beta relu(bound - NLL(y_f)) + NLL(y_r) + alpha sum_blocks |factors|, and merge them.

    |factors| is the root of the sum of all squares of a block's factors: a group lasso, under which whole blocks stay
    near unedited, so that the norms tell where the edit sits. The forget term stops once the answers' NLL has reached
    the bound; a bound well above ln(vocabulary), what guessing costs, asks for answers that are avoided, not unknown.
    Our choice: an MLP is every linear map of a block that is not part of its attention; the scale of the factors is 2;
    rank, beta and alpha as in the authors' few-shot runs on faces.

    Args:
        model: the model, edited in place.
        lessons: facts, steps and learning rate.
        rank: width of the factors.
        bound: NLL in nats a token beyond which forget answers are pushed no further.
        beta: weight of the forget term.
        alpha: weight of the sum of norms.
        warm: share of the steps before the sum of norms is added (0 to 1).
    """
    maps = [m for m in linear_maps(model) if "attn" not in m.name and "attention" not in m.name]
    forget, retain = lessons.batches("forget"), lessons.batches("retain")
    with low_rank(model, maps, rank=rank, seed=lessons.seed) as factors:

        def step(done: float) -> Tensor:
            loss = beta * bounded(model, next(forget), bound) + nll(model, next(retain))
            return loss if done < warm else loss + alpha * torch.stack(block_norms(factors)).sum()

        descend(trained(factors), lessons, step)


def bounded(model: Any, batch: Batch, bound: float) -> Float[Tensor, ""]:
    """Return relu(bound - NLL), which has no gradient once the NLL is above the bound."""
    return (bound - nll(model, batch)).relu()


def block_norms(factors: Sequence[Factors]) -> list[Float[Tensor, ""]]:
    """Return for every block that has factors the norm of all of them together, first block to last."""
    blocks = sorted({f.map.block for f in factors})
    return [torch.cat([p.flatten() for p in trained([f for f in factors if f.map.block == b])]).norm() for b in blocks]
