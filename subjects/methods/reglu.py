"""ReGLU, representation-guided low-rank unlearning (2026, arXiv:2604.17396)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from lethescope.errors import InputError
from lethescope.hooks import watching
from lethescope.subjects.methods.answers import nll
from lethescope.subjects.methods.gradients import Factors, LinearMap, linear_maps, low_rank, trained
from lethescope.subjects.methods.training import LORA_RANK, Lessons, descend
from lethescope.subjects.methods.vila import inverted_hinge
from lethescope.tokens import Batch

RIDGE = 1e-4


def edit(
    model: Any,
    lessons: Lessons,
    *,
    rank: int = LORA_RANK,
    beta: float = 0.7,
    penalty: float = 0.5,
    kept: int = 128,
    alpha: float = 1.0,
    examples: int = 256,
) -> None:
    """Train low-rank factors that start in, and are held in, output directions of the forget facts; merge them.

    For each linear map, C_f and C_r are the second moments of its outputs (`outputs`) on forget and retain examples,
    each with 1e-4 I added. B starts as Q, the leading `rank` eigenvectors of (1 - beta) C_f - beta C_r, and A as Q^T W,
    taken off W. The loss is IHL(y_f) + alpha NLL(y_r) + penalty sum_maps |B^T Q_r|_F^2 (`leak`), where Q_r are the
    leading eigenvectors of C_r. IHL is `vila.inverted_hinge`, as in the authors' code.

    Our choices: outputs are summed over the positions that predict answer tokens, where the code sums over all, padding
    included; Q_r has at most half as many columns as the map has outputs, since with all of them B could only shrink,
    and none where C_r is hardly more than what was added to it, since those are arbitrary; the scale of the factors is
    2, as in the authors' TOFU runs.

    Directions where forget outputs are large are where the facts show. They need not be where they are held.

    Args:
        model: the model, edited in place.
        lessons: facts, steps and learning rate.
        rank: width of the factors.
        beta: weight of the retain outputs in the choice of directions (0 to 1).
        penalty: weight of the leak into retain directions.
        kept: retain directions to stay out of.
        alpha: weight of the retain term.
        examples: most examples of a split to take outputs on.

    Raises:
        InputError: outputs would be taken on no example.
    """
    if examples < 1:
        raise InputError(f"examples is the number of examples to take outputs on, at least 1, not {examples}")
    maps = linear_maps(model)
    seen = {split: outputs(model, maps, _drawn(lessons, split, examples)) for split in ("forget", "retain")}
    both = [directions(f, r, beta, rank, kept) for f, r in zip(seen["forget"], seen["retain"], strict=True)]
    forget, retain = lessons.batches("forget"), lessons.batches("retain")
    with low_rank(model, maps, rank=rank, seed=lessons.seed) as factors:
        for f, (q, _) in zip(factors, both, strict=True):
            f.start_from(q.mT @ f.map.weight.detach().float(), q)

        def step(_done: float) -> Tensor:
            loss = inverted_hinge(model, next(forget)) + alpha * nll(model, next(retain))
            return loss + penalty * leak(factors, [q_r for _, q_r in both])

        descend(trained(factors), lessons, step)


@torch.no_grad()
def outputs(model: Any, maps: Sequence[LinearMap], batches: Sequence[Batch]) -> list[Float[Tensor, "example out"]]:
    """Return each map's output, summed for each example over the positions that predict an answer token."""
    found: list[list[Tensor]] = [[] for _ in maps]

    def see(batch: Batch, i: int, output: Float[Tensor, "batch pos out"]) -> None:
        predicts = batch.answer_mask[:, 1:].float()
        found[i].append(einsum(output[:, :-1].float(), predicts, "batch pos out, batch pos -> batch out"))

    for batch in batches:
        with watching({i: m.module for i, m in enumerate(maps)}, partial(see, batch)):
            model(**batch.inputs())
    return [torch.cat(parts) for parts in found]


def directions(
    forget: Float[Tensor, "example out"], retain: Float[Tensor, "other out"], beta: float, rank: int, kept: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "out kept"]]:
    """Return the leading eigenvectors of (1 - beta) C_f - beta C_r, and those of C_r.

    Args:
        forget: a map's outputs on forget examples.
        retain: its outputs on retain examples.
        beta: weight of the retain outputs.
        rank: how many of the first.
        kept: how many of the second, at most: see `edit`.
    """
    ridge = RIDGE * torch.eye(forget.shape[-1], dtype=torch.float64, device=forget.device)
    f, r = (h.double().mT @ h.double() / len(h) + ridge for h in (forget, retain))
    chosen = torch.linalg.eigh((1 - beta) * f - beta * r).eigenvectors.flip(-1)
    size, avoided = torch.linalg.eigh(r)
    held = min(kept, len(size) // 2, int((size > 2 * RIDGE).sum()))
    return chosen[:, :rank].float(), avoided.flip(-1)[:, :held].float()


def leak(factors: Sequence[Factors], avoided: Sequence[Float[Tensor, "out kept"]]) -> Float[Tensor, ""]:
    """Return sum_maps |B^T Q_r|_F^2: how far the factors write into retain directions; 0 when at a right angle."""
    return torch.stack([(f.b.mT @ q.to(f.b.dtype)).square().sum() for f, q in zip(factors, avoided, strict=True)]).sum()


def _drawn(lessons: Lessons, split: Literal["forget", "retain"], most: int) -> list[Batch]:
    all_of_them = lessons.examples(split)
    rows = np.random.default_rng([lessons.seed, 5]).permutation(len(all_of_them))[:most]
    size = lessons.batch_size
    return [lessons.collate([all_of_them[k] for k in rows[i : i + size]]) for i in range(0, len(rows), size)]
