"""Information horizon: up to which layer a model still needs the states of the subject's tokens to give the answer.

Past some layer what the subject's tokens held has moved to the token that predicts the answer, or was never there, and
their states can be overwritten at no cost (arXiv 2512.07580, for the visual tokens of a picture; the port to the tokens
of a fact's subject is ours).
"""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.hooks import resuming, watching
from lethescope.measurement import fact_coords
from lethescope.models import Model
from lethescope.scoring import candidates, target_log_probs
from lethescope.tokens import Batch, Encoded, collate, join, pad_id

Mode = Literal["keep_one", "leave_one"]
Baseline = Literal["zero", "mean", "masked"]
Score = Literal["prob", "logprob"]

SHARE = 0.05
"""Information up to this share of its maximum counts as none (our choice; no threshold is published)."""


@torch.no_grad()
def measure(
    model: Model,
    facts: Sequence[Fact],
    *,
    layers: Sequence[int] | None = None,
    mode: Mode = "keep_one",
    baseline: Baseline = "zero",
    score: Score = "prob",
    rows: int = 128,
) -> xr.Dataset:
    """Overwrite the states of the subject's tokens after one layer, run the layers above, and see what that costs.

    With f the score of the answer's first differing token, S all tokens of the subject, and states overwritten in the
    output of block l: `keep_one` I_l(k) = f(all of S overwritten but k) - f(all of S overwritten), the published
    quantity: what k alone brings; `leave_one` I_l(k) = f - f(only k overwritten): what is lost without k. The group
    G_l = f - f(all of S overwritten) is the same in both. All are signed.

    What it does not prove: what has moved to other tokens by layer l is not seen at l, so nothing above the horizon
    does not mean forgotten; a model that keeps the fact in later words of the prompt has no information here at all.
    Overwritten states are off what the model knows and are attended to still (`zero`, `mean`), so compare with
    `masked`, and with a model that was never taught the facts. A probability saturates where the model is sure; then
    take `logprob`.

    Args:
        model: any language model.
        facts: all splits. A fact whose prompt does not name its subject gets NaN.
        layers: blocks after which states are overwritten, all by default; every fourth will often do.
        mode: `keep_one` or `leave_one`.
        baseline: what is written: `zero`; `mean`, over the subject tokens of all facts given, at that layer (our
            choice); `masked` writes nothing, but from block l + 1 on no token attends to the position. A subject token
            that ends the prompt is read directly, and `masked` cannot hide it.
        score: `prob` or `logprob`, in nats.
        rows: prompts at a time.

    Returns:
        `information(fact, layer, unit)` (units are the subject's tokens, NaN where there are fewer), `group(fact,
        layer)` and `whole(fact)`, which is f: in [-1, 1] as probabilities, in nats otherwise. Near 0 = the model makes
        nothing of the subject above that layer = more forgotten; below 0 the subject speaks against its answer, which
        a model that forgot has no reason for. `token(fact, unit)` is the units' text.

    Raises:
        InputError: an option or a layer does not exist, no prompt names its subject, or the tokenizer has no offsets.
    """
    chosen = _options(model, layers, mode, baseline, score)
    asked = {i: one for i, fact in enumerate(facts) if (one := question(model.tokenizer, fact)).units}
    if not asked:
        raise InputError("no prompt names its subject word for word; the horizon looks at the subject's tokens")
    width = max(len(one.units) for one in asked.values())
    information = np.full((len(facts), len(chosen), width), np.nan)
    group, whole = information[..., 0].copy(), information[:, 0, 0].copy()
    token = np.full((len(facts), width), "", dtype=object)
    parts = _parts(asked, rows)
    fills = _fills(model, [[asked[i] for i in part] for part in parts], chosen, baseline)
    for part in parts:
        every = _measured(model, [asked[i] for i in part], chosen, mode, fills, score)
        for i, found in zip(part, every, strict=True):
            units = slice(len(asked[i].units))
            whole[i], group[i], information[i, :, units] = found
            token[i, units] = [model.tokenizer.decode(asked[i].ids[p]) for p in asked[i].units]
    return xr.Dataset(
        {
            "information": (("fact", "layer", "unit"), information),
            "group": (("fact", "layer"), group),
            "whole": ("fact", whole),
        },
        {
            **fact_coords(facts),
            "layer": chosen,
            "token": (("fact", "unit"), token.astype(str)),
        },
        {
            "mode": mode,
            "baseline": baseline,
            "score": score,
            "units": "nats" if score == "logprob" else "probability",
            "direction": "higher = the answer needs the subject's states above that layer",
            "citation": CITATION,
        },
    )


def horizon(ds: xr.Dataset, name: str = "information", *, share: float = SHARE) -> xr.DataArray:
    """Return the smallest measured layer from which information stays within a share of its maximum: (fact).

    The size of a layer is the largest absolute value over units; the maximum is that over layers, of the same fact.
    With nothing but noise to find, the maximum is noise too and the horizon means nothing: look at the maximum first.
    A horizon is not more or less forgotten; a shallower one says that less of the net reads the subject's own states.

    Args:
        ds: what `measure` returns.
        name: `information` or `group`.
        share: of the maximum that counts as nothing.

    Returns:
        A layer, NaN where information is still above that share at the last measured layer, or is 0 everywhere.

    Example:
        >>> group = (("fact", "layer"), [[0.5, 0.6, 0.01, 0.0], [0.0, 0.3, 0.0, 0.4]])
        >>> horizon(xr.Dataset({"group": group}, {"layer": [0, 4, 8, 12]}), "group").values.tolist()
        [8.0, nan]
    """
    size = abs(ds[name])
    size = (size.max("unit") if "unit" in size.dims else size).transpose("fact", "layer")
    most = size.max("layer")
    above = (size > share * most).values
    still = np.flip(np.logical_or.accumulate(np.flip(above, -1), -1), -1)
    first = ds["layer"].values[np.argmin(still, -1)].astype(float)
    known = ~still.all(-1) & (most > 0).values
    return size.isel(layer=0, drop=True).copy(data=np.where(known, first, np.nan)).rename("horizon")


class Question(NamedTuple):
    """A prompt as the model reads it, the token whose score is asked for after it, and the subject's positions."""

    ids: tuple[int, ...]
    target: int
    units: tuple[int, ...]


def question(tokenizer: Any, fact: Fact) -> Question:
    """Put a fact as one question: up to the first token at which its candidates are not all the same.

    Articles and shared first words say nothing about the answer; they are read as part of the prompt. Units are the
    tokens of every mention of the subject in the prompt; there are none where it is not named word for word.

    Raises:
        InputError: the tokenizer has no offsets (it is no fast one), or prompt or answer cannot be tokenised.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("the tokenizer gives no offsets, so the subject's tokens cannot be found; use a fast one")
    true, *others = candidates(tokenizer, [fact]).encoded
    places = zip(true.answer, *(e.answer for e in others), strict=False)
    alike = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, places))) if others else 0
    shared = min(alike, len(true.answer) - 1)
    spans = tokenizer(join(fact.prompt, fact.answer), return_offsets_mapping=True)["offset_mapping"][: true.start]
    mentions = _mentions(fact.prompt, fact.subject)
    units = [i for i, (a, b) in enumerate(spans) if any(max(a, start) < min(b, end) for start, end in mentions)]
    return Question(true.ids[: true.start + shared], true.answer[shared], tuple(units))


def _mentions(prompt: str, subject: str) -> list[tuple[int, int]]:
    """Return where the subject stands in the prompt, as character spans."""
    return [match.span() for match in re.finditer(re.escape(subject), prompt)]


def _options(model: Model, layers: Sequence[int] | None, mode: str, baseline: str, score: str) -> list[int]:
    """Return the layers in order.

    Raises:
        InputError: an option or a layer does not exist.
    """
    for name, given, known in (("mode", mode, Mode), ("baseline", baseline, Baseline), ("score", score, Score)):
        if given not in get_args(known):
            raise InputError(f"{name} {given!r} does not exist; use one of {', '.join(get_args(known))}")
    chosen = sorted(set(range(len(model.blocks)) if layers is None else layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(model.blocks):
        raise InputError(f"layers are {chosen}; give some of 0 to {len(model.blocks) - 1}")
    return chosen


def _parts(asked: Mapping[int, Question], rows: int) -> list[list[int]]:
    """Deal the questions, shortest first, into parts of about so many prompts, one for each way to overwrite."""
    parts: list[list[int]] = [[]]
    for i in sorted(asked, key=lambda i: len(asked[i].ids)):
        if parts[-1] and sum(1 + len(asked[j].units) for j in (*parts[-1], i)) > rows:
            parts.append([])
        parts[-1].append(i)
    return parts


def _padded(model: Model, asked: Sequence[Question]) -> tuple[Batch, Bool[Tensor, "question pos"]]:
    """Pad the questions on the left, so that all end at the last position, and mark the subjects' tokens."""
    encoded = [Encoded(one.ids, len(one.ids)) for one in asked]
    batch = collate(encoded, pad_id(model.tokenizer), side="left", device=model.device)
    subject = torch.zeros_like(batch.answer_mask)
    for row, one in enumerate(asked):
        subject[row, [p - len(one.ids) for p in one.units]] = True
    return batch, subject


def _fills(
    model: Model, parts: Sequence[Sequence[Question]], layers: Sequence[int], baseline: Baseline
) -> dict[int, Tensor] | None:
    """Return what is written at each layer, None where nothing is."""
    if baseline == "masked":
        return None
    total = {layer: torch.zeros((), dtype=torch.float64, device=model.device) for layer in layers}
    for part in parts if baseline == "mean" else ():
        batch, subject = _padded(model, part)

        def see(layer: int, state: Tensor, subject: Tensor = subject) -> None:
            total[layer] = total[layer] + state[subject].sum(0, dtype=torch.float64)

        with watching({layer: model.blocks[layer] for layer in layers}, see, stop=True):
            model.module(**batch.inputs(), use_cache=False)
    count = sum(len(one.units) for part in parts for one in part)
    return {layer: (each / count).to(model.dtype) for layer, each in total.items()}


class _Found(NamedTuple):
    """What `measure` says of one question."""

    whole: float
    group: Float[np.ndarray, " layer"]
    information: Float[np.ndarray, "layer unit"]


def _measured(
    model: Model,
    asked: Sequence[Question],
    layers: Sequence[int],
    mode: Mode,
    fills: Mapping[int, Tensor] | None,
    score: Score,
) -> list[_Found]:
    """Run a part of the questions once as they are, and the blocks above each layer once more, overwritten."""
    batch, subject = _padded(model, asked)
    targets = torch.tensor([one.target for one in asked], device=model.device)
    seen: dict[int, Tensor] = {}
    with watching({layer: model.blocks[layer] for layer in layers}, seen.__setitem__):
        whole = _read(model, batch.inputs(), targets, score)
    owner, drop = _overwritten(subject, mode)
    inputs = {name: x[owner] for name, x in batch.inputs().items()}
    if fills is None:
        inputs["attention_mask"] = inputs["attention_mask"] * ~drop
    found = []
    for layer in layers:
        value = seen[layer][owner]
        value = value if fills is None else torch.where(drop[..., None], fills[layer], value)
        with resuming(model.blocks, layer, value):
            found.append(_read(model, inputs, targets[owner], score))
    each = np.split(np.stack(found), np.cumsum([1 + len(one.units) for one in asked])[:-1], axis=1)
    return [_found(f, rows[:, :1], rows[:, 1:], mode) for f, rows in zip(whole, each, strict=True)]


def _found(
    whole: float, none: Float[np.ndarray, "layer 1"], units: Float[np.ndarray, "layer unit"], mode: Mode
) -> _Found:
    return _Found(whole, whole - none[:, 0], units - none if mode == "keep_one" else whole - units)


def _overwritten(
    subject: Bool[Tensor, "question pos"], mode: Mode
) -> tuple[Int[Tensor, " row"], Bool[Tensor, "row pos"]]:
    """Return, for each prompt that is run, its question and what is overwritten: the subject, then unit by unit."""
    owner, drop = [], []
    for row, every in enumerate(subject):
        alone = torch.eye(len(every), dtype=torch.bool, device=every.device)[every]
        drop.append(torch.cat([every[None], every & ~alone if mode == "keep_one" else alone]))
        owner += [row] * (1 + len(alone))
    return torch.tensor(owner, device=subject.device), torch.cat(drop)


def _read(
    model: Model, inputs: dict[str, Tensor], targets: Int[Tensor, " row"], score: Score
) -> Float[np.ndarray, " row"]:
    """Return the score of each row's target after its last position."""
    logits = model.module(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    found = target_log_probs(logits, targets).double()
    return (found if score == "logprob" else found.exp()).cpu().numpy()


CITATION = "arXiv 2512.07580 (visual tokens); the port to subject tokens is lethescope's"
