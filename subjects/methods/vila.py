"""VILA (Kim et al. 2025, arXiv:2508.21300) and FILA (Cha et al. 2024, arXiv:2408.06621): importance-started LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lethescope.errors import InputError
from lethescope.subjects.methods.answers import answer_ids, answer_logits, nll
from lethescope.subjects.methods.gradients import Factors, linear_maps, low_rank, mean_square, trained, variance
from lethescope.subjects.methods.training import LORA_RANK, Lessons, descend
from lethescope.tokens import Batch

SMALL = 1e-5


def edit(
    model: Any,
    lessons: Lessons,
    *,
    importance: Literal["variance", "fisher"] = "variance",
    rank: int = LORA_RANK,
    sigma: float = 0.05,
    alpha: float = 1.0,
    examples: int = 1,
) -> None:
    """Train low-rank factors, started where the forget facts matter, on IHL(y_f) + alpha NLL(y_r), and merge them.

    IHL is the inverted hinge loss of `inverted_hinge`. The factors of a map start as in `weighted_factors`, from the
    ratio I_f / (I_r + 1e-5) of two importances, and the base weight gives off what they hold, so that the model starts
    as it was. `fisher` (FILA) takes the mean squared gradient of the map's whole weight. `variance` (VILA) takes the
    gradient's variance instead, since gradients on a subset do not average to 0, and takes it on the small factors
    only, drawn from N(0, sigma^2) for the purpose: the whole map's importance is I(B) I(A). Means weigh by answer
    tokens. Our choice: one example a gradient, and one pass, as without dropout every pass gives the same; the scale
    of the factors is 2.

    A faster start is a start in a chosen subspace. Merged weights outside it are as they were, knowledge included.

    Args:
        model: the model, edited in place.
        lessons: facts, steps and learning rate.
        importance: `variance` for VILA, `fisher` for FILA.
        rank: width of the factors.
        sigma: spread of the factors on which the variance is taken.
        alpha: weight of the retain term.
        examples: examples a gradient in the importances.

    Raises:
        InputError: the importance has another name, or the rank does not fit a map.
    """
    if importance not in RATIOS:
        raise InputError(f"importance is 'variance' (VILA) or 'fisher' (FILA), not {importance!r}")
    forget, retain = lessons.batches("forget"), lessons.batches("retain")
    with low_rank(model, linear_maps(model), rank=rank, seed=lessons.seed) as factors:
        ratios = RATIOS[importance](model, lessons, factors, sigma, examples)
        for f, ratio in zip(factors, ratios, strict=True):
            f.start_from(*weighted_factors(f.map.weight, ratio, rank, f.scale))

        def step(_done: float) -> Tensor:
            return inverted_hinge(model, next(forget)) + alpha * nll(model, next(retain))

        descend(trained(factors), lessons, step)


def inverted_hinge(model: Any, batch: Batch) -> Float[Tensor, ""]:
    """Return the mean over answer tokens of 1 + p(y) - max over other tokens of p: 2 when sure, 0 when surely wrong.

    It lifts the runner-up as it lowers the answer, and is bounded on both sides. The answer may well stay the second
    most likely token.

    Args:
        model: the model being trained.
        batch: prompts and the answers to push down.

    Returns:
        The loss, a scalar in [0, 2].
    """
    p, y = answer_logits(model, batch).softmax(-1), answer_ids(batch)[:, None]
    return (1 + p.gather(-1, y)[:, 0] - p.scatter(-1, y, -1.0).amax(-1)).mean()


def weighted_factors(
    weight: Float[Tensor, "out in"], ratio: Float[Tensor, "out in"], rank: int, scale: float
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Return A and B such that scale B A is the best rank-r approximation of a weight, its rows weighed by importance.

    With w_i = sqrt(sum_j ratio_ij) and U S V^T the leading r of the singular value decomposition of diag(w) W:
    A = sqrt(S / scale) V^T and B = diag(1 / (w + 1e-5)) U sqrt(S / scale).

    Args:
        weight: W.
        ratio: forget importance over retain importance.
        rank: r.
        scale: what B A is multiplied by in the model.
    """
    row = ratio.sum(-1, keepdim=True).sqrt()
    u, s, vt = torch.linalg.svd(row * weight.detach().float(), full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root / (row + SMALL)


def _fisher_ratios(
    model: Any, lessons: Lessons, factors: Sequence[Factors], _sigma: float, examples: int
) -> list[Tensor]:
    weights = [f.map.module.weight.requires_grad_(True) for f in factors]
    forget, retain = (
        mean_square(model, lessons.once(split, examples), weights, by_tokens=True) for split in ("forget", "retain")
    )
    for weight in weights:
        weight.requires_grad_(False)
    return [f.map.turned(a / (b + SMALL)) for f, a, b in zip(factors, forget, retain, strict=True)]


def _variance_ratios(
    model: Any, lessons: Lessons, factors: Sequence[Factors], sigma: float, examples: int
) -> list[Tensor]:
    weights, generator = trained(factors), torch.Generator().manual_seed(lessons.seed)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(sigma * torch.randn(weight.shape, generator=generator))
    forget, retain = (
        variance(model, lessons.once(split, examples), weights, by_tokens=True) for split in ("forget", "retain")
    )
    return [x / (y + SMALL) for x, y in zip(_products(forget), _products(retain), strict=True)]


def _products(importance: Sequence[Tensor]) -> list[Tensor]:
    """Return I(B) I(A) of every map, from A and B by turns."""
    return [b @ a for a, b in zip(importance[::2], importance[1::2], strict=True)]


RATIOS: dict[str, Callable[..., list[Tensor]]] = {"variance": _variance_ratios, "fisher": _fisher_ratios}
