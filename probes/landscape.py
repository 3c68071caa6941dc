"""Channel *landscape*: the loss of an answer at its prompt, against its loss at prompts nearby.

A neighbour of a prompt has some of its tokens replaced by tokens whose embeddings are close. Training on a text leaves
a mark on the loss around it, not only at it (REMIND, arXiv 2511.04228). The channel asks whether the true answer stands
out there as wrong answers do not; `landscape_features` holds the paper's own use, a classifier of facts.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from einops import rearrange
from jaxtyping import Float, Int
from torch.nn import functional

from lethescope import measurement
from lethescope.channel import Channel
from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.models import Model
from lethescope.scoring import candidates, score_tokens
from lethescope.tokens import Encoded

SIZES = (0.1, 0.3, 0.5)
"""Neighbourhood sizes: the probability with which a token of the prompt is replaced. The paper's own is 0.3."""


def measure(
    model: Model,
    facts: Sequence[Fact],
    *,
    original: Model | None = None,
    seed: int = 0,
    k: int = 15,
    m: int = 20,
    sizes: Sequence[float] = SIZES,
) -> xr.Dataset:
    """Score how much every candidate stands out at a fact's prompt and around it.

    With l_0 the mean loss of an answer's tokens after the prompt and l_1 … l_K after K neighbours of the prompt, two
    families of places, one place a size (the scores are our choice; the paper feeds features to a classifier):

    - `sharpness`: `mean_k l_k - l_0`, how much the answer gains from this very prompt. A memorised answer is a sharp
      minimum of the loss, its alternatives are not. What makes any answer of the kind likelier cancels out.
    - `relief`: `|mean_k l_k - l_0|`, hill or hole. An answer that was pushed down at its prompt is a sharp maximum:
      the model tells it from wrong ones still, by saying it less than them.

    A high score says that the true answer is tied to these words as wrong ones are not; relief alone does not say that
    the model can be made to say it. A low score does not mean that the fact is gone: it may be tied to all words alike.

    Args:
        model: any language model.
        facts: forget and control facts; the prompts are perturbed, the answers are not.
        original: its token embeddings say what is near, so that all models of an audit are asked the same prompts;
            none, or one with another vocabulary: the model's own.
        seed: of the neighbours; a fact's neighbours do not depend on the other facts.
        k: neighbours of a prompt for each size.
        m: how many nearest tokens a replacement is drawn from.
        sizes: the probabilities with which a token is replaced.

    Returns:
        `score(fact, candidate, place)` in nats per answer token, higher = less forgotten; places are `sharpness p` and
        `relief p` with coordinates `family` and `replaced`. Beside it `loss(fact, candidate)`,
        `neighbour_loss(fact, candidate, size, neighbour)`, both >= 0, and `changed(fact, size, neighbour)`, the share
        of the prompt's tokens that were replaced, in (0, 1].

    Raises:
        InputError: an option is out of range, or a prompt or an answer cannot be tokenised.
    """
    _check(k, m, sizes)
    space = original if original is not None and original.vocabulary == model.vocabulary else model
    asked = candidates(model.tokenizer, facts)
    prompts = [e.ids[: e.start] for e, c in zip(asked.encoded, asked.candidate, strict=True) if c == 0]
    table = nearest(space, sorted({token for prompt in prompts for token in prompt}), m)
    drawn = [neighbours(p, table, f.id, k=k, sizes=sizes, seed=seed) for p, f in zip(prompts, facts, strict=True)]
    around = [
        [list(prompt), *rearrange(d.ids, "size k pos -> (size k) pos").tolist()]
        for prompt, d in zip(prompts, drawn, strict=True)
    ]
    encoded = [
        Encoded((*prompt, *e.answer), len(prompt))
        for e, fact in zip(asked.encoded, asked.fact, strict=True)
        for prompt in around[fact]
    ]
    losses = -np.nanmean(score_tokens(model, encoded)[0], -1)
    every = asked.table(losses.reshape(len(asked.encoded), -1))
    near = rearrange(every[..., 1:], "fact candidate (size k) -> fact candidate size k", k=k)
    sharpness = near.mean(-1) - every[..., :1]
    score = {"sharpness": sharpness, "relief": abs(sharpness)}
    return measurement.from_scores(
        np.concatenate(list(score.values()), -1),
        facts,
        [f"{family} {size:g}" for family in score for size in sizes],
        place_coords={"family": [f for f in score for _ in sizes], "replaced": [*sizes] * len(score)},
        variables={
            "loss": (("fact", "candidate"), every[..., 0]),
            "neighbour_loss": (("fact", "candidate", "size", "neighbour"), near),
            "changed": (("fact", "size", "neighbour"), np.stack([d.changed for d in drawn])),
        },
    ).assign_coords(size=list(sizes))


class Neighbours(NamedTuple):
    """Perturbed prompts, and the share of its tokens that each had replaced."""

    ids: Int[np.ndarray, "size k pos"]
    changed: Float[np.ndarray, "size k"]


def nearest(model: Model, tokens: Sequence[int], m: int = 20) -> dict[int, Int[np.ndarray, " near"]]:
    """Return, for every token that is not special, the m tokens with the nearest input embeddings by cosine.

    The token itself and special tokens are never among them; there are fewer than m where the vocabulary is small. The
    paper takes the neighbours from GPT-2's embeddings for every model and goes through the text; ours are the
    original's own, put in as ids, so that no words merge and the answer's tokens stay what they are (our choice).

    Args:
        model: whose embeddings say what is near.
        tokens: ids to look up; special ones are left out of the result.
        m: how many.

    Returns:
        token -> ids, nearest first.
    """
    special = set(model.tokenizer.all_special_ids)
    asked = [token for token in tokens if token not in special]
    weight = model.module.get_input_embeddings().weight.detach()[: len(model.tokenizer)].float()
    space = functional.normalize(weight, dim=-1)
    most = min(m, len(space) - len(special) - 1)
    found: dict[int, np.ndarray] = {}
    for part in (asked[i : i + 256] for i in range(0, len(asked), 256)):
        cosine = space[part] @ space.T
        cosine[:, sorted(special)] = -torch.inf
        cosine[range(len(part)), part] = -torch.inf
        found.update(zip(part, cosine.topk(most).indices.cpu().numpy(), strict=True))
    return found


def neighbours(
    prompt: Sequence[int],
    table: Mapping[int, Int[np.ndarray, " near"]],
    name: str = "",
    *,
    k: int = 15,
    sizes: Sequence[float] = SIZES,
    seed: int = 0,
) -> Neighbours:
    """Draw K neighbours of a prompt for each size (REMIND, algorithm 1).

    Every token in the table is replaced with probability p by one of its nearest, all alike. Our choice: the sizes
    share their draws, so that what is replaced at a small p is replaced in the same way at a larger one; and the token
    with the smallest draw is always replaced, because a short prompt would often be its own neighbour.

    Args:
        prompt: token ids; those that are not in the table (special tokens) stay.
        table: what `nearest` returns.
        name: of the fact; decides the draws together with the seed.
        k: neighbours of each size.
        sizes: probabilities.
        seed: decides the draws together with the name.

    Returns:
        The neighbours, all as long as the prompt.

    Raises:
        InputError: no token of the prompt is in the table.

    Example:
        >>> drawn = neighbours([1, 7, 8], {7: np.array([70]), 8: np.array([80])}, k=2, sizes=[1.0])
        >>> drawn.ids.tolist(), drawn.changed.tolist()
        ([[[1, 70, 80], [1, 70, 80]]], [[1.0, 1.0]])
    """
    ids = np.array(prompt)
    free = np.array([i for i, token in enumerate(prompt) if token in table], dtype=np.intp)
    if not len(free):
        raise InputError(f"fact {name!r}: its prompt holds special tokens only; a neighbour needs a word to replace")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    near = np.stack([table[token] for token in ids[free]])
    draw = rng.random((k, len(free)))
    other = near[np.arange(len(free)), rng.integers(near.shape[1], size=draw.shape)]
    moved = (draw < np.reshape(sizes, (-1, 1, 1))) | (draw == draw.min(-1, keepdims=True))
    out = np.tile(ids, (len(sizes), k, 1))
    out[..., free] = np.where(moved, other, ids[free])
    return Neighbours(out, moved.mean(-1))


def _check(k: int, m: int, sizes: Sequence[float]) -> None:
    if k < 1 or m < 1:
        raise InputError(f"k is {k} and m is {m}; a landscape needs at least one neighbour and one token to draw from")
    if not len(sizes) or not all(0 < p <= 1 for p in sizes) or len(set(sizes)) < len(sizes):
        raise InputError(f"sizes are {list(sizes)}; give different probabilities, above 0 and at most 1")


CHANNEL = Channel(
    name="landscape",
    measure=measure,
    version=1,
    scale="preference",
    citation="REMIND (arXiv 2511.04228)",
    budgets={
        "quick": {"k": 5, "sizes": (0.3,)},
        "standard": {"k": 15, "sizes": SIZES},
        "thorough": {"k": 40, "sizes": SIZES},
    },
    sees_original=True,
)
