"""Channel *patch*: put the unlearned model's states into the original and see how much of the fact they still carry."""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lethescope import measurement
from lethescope.channel import Channel, every_budget
from lethescope.facts import Fact
from lethescope.hooks import capturing, resuming
from lethescope.models import Model
from lethescope.probes import lens
from lethescope.scoring import Candidates, candidates, tails
from lethescope.tokens import Encoded

Scores = Float[np.ndarray, "fact candidate layer"]

ENCODES = 0.05
"""A layer encodes a fact when patching in a state without it costs more than this many nats (UDS's threshold)."""
CARRIES = 0.8
"""A block's state carries the facts when the lens reads this share from it of the most it reads anywhere."""


def measure(model: Model, facts: Sequence[Fact], *, original: Model, seed: int = 0, reverse: bool = True) -> xr.Dataset:
    """Run the original, overwrite one block's output with the model's, and score the candidates; block by block.

    Only the positions that predict the answer are overwritten, and only the blocks above are run again. What the
    original can still say from the patched state, the model's blocks up to there still carry. A low score means that
    the original's upper blocks cannot use the state; the fact may still be there in another form.

    The null (`null_score`) is the original's own state under the same words about a control subject, who was never
    taught to anyone. Below the blocks from which the lens reads the facts in the original, a state may name the subject
    only, and the original's upper blocks would fetch the answer for it: a model that forgot would pass. There the null
    is the unpatched score, so that these blocks cannot testify.

    Args:
        model: where the states come from; the original itself gives the unpatched scores.
        facts: forget facts are patched; control facts name the null subjects.
        original: the model that is run.
        seed: of the draw of null subjects.
        reverse: also patch the original's states into the model (`restored_score`): where does that suffice?

    Returns:
        `score(fact, candidate, place)` in nats per answer token, places are blocks; `null_score` for the original,
        `restored_score` for other models, both alike.
    """
    forget = [f for f in facts if f.split == "forget"]
    asked = candidates(original.tokenizer, forget)
    layers = len(original.blocks)
    extra: dict[str, np.ndarray] = {}
    if model.fingerprint == original.fingerprint:
        plain = _patched(original, asked.encoded, original, asked.encoded, [layers - 1])
        score = asked.table(np.repeat(plain, layers, 1))
        extra["null_score"] = np.where(carrying(original, forget), _null(original, facts, asked, seed), score)
    else:
        score = asked.table(_patched(original, asked.encoded, model, asked.encoded, range(layers)))
        if reverse:
            extra["restored_score"] = asked.table(
                _patched(model, asked.encoded, original, asked.encoded, range(layers))
            )
    dims = ("fact", "candidate", "place")
    return measurement.from_scores(
        score,
        forget,
        [f"block {layer}" for layer in range(layers)],
        place_coords={"layer": range(layers)},
        variables={name: (dims, array) for name, array in extra.items()},
    )


def null_facts(facts: Sequence[Fact], seed: int) -> list[Fact | None]:
    """Give each forget fact the same words about a control subject, or None where that cannot be done.

    The subject's name in the prompt is replaced by a control subject's; where the prompt does not name its subject, a
    control fact's prompt of the same relation is taken.
    """
    control = [f for f in facts if f.split == "control"]
    rng = np.random.default_rng(seed)
    out: list[Fact | None] = []
    for fact in (f for f in facts if f.split == "forget"):
        alike = [c for c in control if c.relation == fact.relation] or control
        if not alike:
            out.append(None)
            continue
        other = alike[rng.integers(len(alike))]
        named = fact.subject in fact.prompt
        prompt = fact.prompt.replace(fact.subject, other.subject) if named else other.prompt
        out.append(fact.model_copy(update={"prompt": prompt, "paraphrases": ()}))
    return out


def _null(original: Model, facts: Sequence[Fact], asked: Candidates, seed: int) -> Scores:
    """Score the candidates from the original's own states about never-taught subjects."""
    others = null_facts(facts, seed)
    layers = range(len(original.blocks))
    if any(other is None for other in others):
        return np.full((*asked.shape, len(layers)), np.nan)
    source = candidates(original.tokenizer, [other for other in others if other is not None])
    same = [a.answer == b.answer for a, b in zip(asked.encoded, source.encoded, strict=True)]
    used = [b if ok else a for a, b, ok in zip(asked.encoded, source.encoded, same, strict=True)]
    scores = _patched(original, asked.encoded, original, used, layers)
    scores[~np.array(same)] = np.nan
    return asked.table(scores)


def carrying(original: Model, forget: Sequence[Fact]) -> list[bool]:
    """For each block, whether the lens reads the facts from the original's state after it."""
    read = lens.measure(original, forget).assign_attrs(scale="preference")
    mean = measurement.value(read).mean("fact").values
    return [bool(x) for x in mean >= CARRIES * mean.max()]


@torch.no_grad()
def _patched(
    target: Model,
    run: Sequence[Encoded],
    source: Model,
    seen: Sequence[Encoded],
    layers: Sequence[int],
    *,
    rows: int = 256,
) -> Float[np.ndarray, "answer layer"]:
    """Score answers in `target` with each block's output taken from `source`, which reads its own sequences."""
    out = np.full((len(run), len(layers)), np.nan)
    for part in (slice(i, i + rows) for i in range(0, len(run), rows)):
        states = tail_states(source, seen[part])
        for batch in tails(target, run[part], apart=[e.ids[: e.start] for e in seen[part]]):
            for column, layer in enumerate(layers):
                value = states[batch.lead, layer, : batch.input_ids.shape[1]].to(target.dtype)
                with resuming(target.blocks, layer, value):
                    mean = batch.mean_log_prob(batch.run(target))
                out[part][batch.rows, column] = mean.double().cpu().numpy()
    return out


def tail_states(model: Model, encoded: Sequence[Encoded]) -> Float[Tensor, "answer layer pos d_model"]:
    """Residual stream after every block at the positions that predict each answer, zero beyond its end."""
    width = max(len(e.tail) for e in encoded)
    found: dict[int, Tensor] = {}
    for batch in tails(model, encoded):
        with capturing(model.blocks, stop=True) as seen:
            batch.run(model)
        states = torch.stack([seen[layer][batch.owner] for layer in range(len(model.blocks))], 1)
        padded = functional.pad(states, (0, 0, 0, width - states.shape[2]))
        found.update(zip(batch.rows, padded, strict=True))
    return torch.stack([found[row] for row in range(len(encoded))])


def erased_share(original: xr.Dataset, source: xr.Dataset, null: xr.DataArray) -> xr.Dataset:
    """How much of what a state without the fact destroys is destroyed by the source's state, per fact and block.

    `D_l = score_original - score_patched` of the true answer (nats per token, averaged over its tokens); a layer
    encodes a fact where the null's D_l > 0.05; `erased_l = clip(D_l(source) / D_l(null), 0, 1)`; the Unlearning Depth
    Score of a fact is the mean of erased_l over its encoding layers, weighted by D_l(null) (arXiv 2605.24614, whose
    null is a reference model). 0 = as in the original, 1 = as in the null. It is not calibrated: published models that
    hold the facts average 0.49.

    Args:
        original: Measurement of the original.
        source: Measurement of the model in question.
        null: (fact, candidate, place) scores of the reference, or the original's `null_score`.

    Returns:
        `erased(fact, place)`, NaN where the layer does not encode the fact, and `depth_score(fact)`.
    """
    whole = original["score"].isel(candidate=0, drop=True)
    lost = whole - source["score"].isel(candidate=0, drop=True)
    lost_null = whole - null.isel(candidate=0, drop=True)
    weight = lost_null.where(lost_null > ENCODES)
    erased = (lost / weight).clip(0, 1)
    depth = (erased * weight).sum("place") / weight.sum("place", min_count=1)
    return xr.Dataset({"erased": erased.transpose("fact", "place"), "depth_score": depth})


CHANNEL = Channel(
    name="patch",
    measure=measure,
    version=2,
    scale="preference",
    citation="Meng et al. 2022 (arXiv 2202.05262); Unlearning Depth Score (arXiv 2605.24614)",
    budgets=every_budget(),
    sees_original=True,
    needs="shape",
    needs_reference=True,
)
