"""Channel *swap*: put modules of the original back into a model; do a few of them, above the memory, bring it back?"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, equal

from lethescope import measurement
from lethescope.analyses.modules import OUTER, Owner, Weight, aligned, holding, parameter, whole
from lethescope.analyses.patch import carrying, null_facts
from lethescope.cells import NotMeasured
from lethescope.channel import Channel
from lethescope.errors import InputError
from lethescope.facts import Fact, of_split
from lethescope.models import Model
from lethescope.scoring import Candidates, candidates, score_tokens
from lethescope.statistics import seeded

KINDS = ("block", "attention", "mlp", "outer", "upper")
"""Whole blocks; their attention; their MLP; embedding, final norm, unembedding; sets of the uppermost blocks."""
KEEPS = 2 / 3
"""A model with modules put in says nothing either way where it says less than this share of its own retain facts."""
UPPER = 1 / 3
"""Share of the blocks, from the top, that may testify."""

Scores = Float[NDArray[np.float64], "fact candidate"]
Places = dict[str, tuple[Owner, ...]]


def measure(
    model: Model,
    facts: Sequence[Fact],
    *,
    original: Model,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    alternatives: int | None = 4,
    retained: int = 64,
) -> xr.Dataset:
    """Put modules of the original into the model, one place at a time, and ask again.

    The scores are those of *say*: what comes back is said. All modules together are the original, so that what comes
    back means something only where the same modules bring nothing to a model that never knew the facts. Three rules
    decide which places may testify:

    - The same modules are put into every reference; where a reference then shows the facts, the modules carry them
      (`residue.LEAKS`). Without a reference the channel is shown, and neither decides nor votes.
    - A reference that the modules break is silent because it is broken. Where a model says less than `KEEPS` of its own
      retain facts the scores are NaN, and a place that has no score in the references does not count.
    - Only modules in the upper third of the blocks and after it (final norm, unembedding) testify, and only where the
      lens reads the facts in the original below them already (`patch.carrying`). A never-taught model that is nearer to
      the original than the references are takes up what lower blocks bring: 0.8 where three of six were put in
      (docs/channels/swap.md). At other places the null (`null_score`) is the original's own score; at these it is the
      original's score of the same candidates about a control subject.

    What it does testify: the rest of the model holds something about the facts that a never-taught model does not, and
    the edit sits in these few modules. What it does not prove: that the rest alone holds the facts, since the
    original's modules may do a part; nor, where nothing comes back, that they are gone: an edit of all blocks is not
    undone by a few.

    Args:
        model: it is left as it was; an adapter is merged into a copy.
        facts: forget and control facts are asked; retain facts tell whether a model still works.
        original: where the modules come from, a model of the same architecture.
        seed: of the draw of retain facts.
        kinds: which places, of `KINDS`.
        alternatives: at most so many are scored.
        retained: at most so many retain facts are asked.

    Returns:
        `score(fact, candidate, place)` in nats per answer token, higher = less forgotten; `kept(place)`, the share of
        the model's own said-probability of retain facts, 1 = all (NaN without retain facts, and then no place may
        testify); `plain_score(fact, candidate)`, nothing put in; `null_score` for the original. Coordinates of a place:
        `kind` and `size`, its number of blocks.

    Raises:
        NotMeasured: a weight has another shape or name than the original's; the first one is named.
        InputError: a kind is not known, or something cannot be tokenised.
    """
    asked = candidates(original.tokenizer, [f for f in facts if f.split != "retain"], most=alternatives)
    try:
        swapping = Swapping(model, original, asked)
    except InputError as error:
        raise NotMeasured(f"channel swap, {model.role}: {error}") from error
    places = places_of(swapping.placed, kinds)
    retain = candidates(original.tokenizer, _drawn(facts, seed, retained), most=0)
    score = np.stack([swapping.scores(owners) for owners in places.values()], -1)
    kept = np.array([_kept(swapping, retain, owners) for owners in places.values()])
    score = np.where(kept < KEEPS, np.nan, score)
    rows = [f for f in facts if f.split != "retain"]
    dims = ("fact", "candidate", "place")
    variables = {"plain_score": (dims[:2], swapping.scores(())), "kept": (("place",), kept)}
    if model.fingerprint == original.fingerprint:
        may = may_testify(original, rows, places, swapping.placed) & bool(retain.encoded)
        variables["null_score"] = (dims, np.where(may, _null(original, rows, asked, seed)[..., None], score))
    told: dict[str, list[Any]] = {
        "kind": [_kind(name) for name in places],
        "size": [_size(o, swapping.placed) for o in places.values()],
    }
    return measurement.from_scores(score, rows, list(places), place_coords=told, variables=variables)


class Swapping:
    """A model that asks again with some of the original's weights in it; what changes nothing is asked once.

    Raises:
        InputError: the models are not of one architecture; the weight is named.
    """

    def __init__(self, model: Model, original: Model, asked: Candidates) -> None:
        self.module, self.source = whole(model), whole(original)
        self.placed = aligned(self.source, self.module)
        self.changed = {o for o in self.placed if not _same(parameter(self.source, o), parameter(self.module, o))}
        self.model = Model(self.module, original.tokenizer, model.role)
        self.asked = asked
        self._known: dict[tuple[int, frozenset[Owner]], Scores] = {}

    def scores(self, owners: Iterable[Owner], asked: Candidates | None = None) -> Scores:
        """Score candidates with the original's weights at these places."""
        asked = asked or self.asked
        differ = frozenset(owners) & self.changed
        if (key := (id(asked), differ)) not in self._known:
            with holding(self.module, {o: parameter(self.source, o) for o in differ}):
                self._known[key] = asked.table(np.nanmean(score_tokens(self.model, asked.encoded)[0], -1))
        return self._known[key]


def _same(one: Tensor, two: Tensor) -> bool:
    return one is two or equal(one, two.to(one))


def places_of(placed: Mapping[Owner, Weight], kinds: Sequence[str] = KINDS) -> Places:
    """Name the places of these kinds, and the weights that are put back at each.

    Sets of the uppermost 1, 2, 4 … blocks, at most a third of all: `blocks 4-5` alone, `from block 4` with the final
    norm and the unembedding. The sets are the same in every model: sets chosen for each would be held against others.

    Raises:
        InputError: a kind is not known.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(f"unknown kind of places {unknown[0] if unknown else ''!r}; use some of {', '.join(KINDS)}")
    blocks = 1 + max(w.layer for w in placed.values())
    made: dict[str, Callable[[Weight], bool]] = {}
    if "outer" in kinds:
        made |= {name: lambda w, name=name: w.row == name for name in OUTER}  # type: ignore[misc]
    for layer in range(blocks):
        for kind in (k for k in ("attention", "mlp") if k in kinds):
            made[f"{kind} {layer}"] = lambda w, layer=layer, kind=kind: (w.layer, w.part) == (layer, kind)  # type: ignore[misc]
        if "block" in kinds:
            made[f"block {layer}"] = lambda w, layer=layer: w.layer == layer  # type: ignore[misc]
    for first in _first_of_upper(blocks) if "upper" in kinds else ():
        if first < blocks - 1:
            made[f"blocks {first}-{blocks - 1}"] = lambda w, first=first: w.layer >= first  # type: ignore[misc]
        made[f"from block {first}"] = lambda w, first=first: w.layer >= first or w.row in OUTER[1:]  # type: ignore[misc]
    found = {name: tuple(o for o, w in placed.items() if takes(w)) for name, takes in made.items()}
    return {name: owners for name, owners in found.items() if owners}


def _first_of_upper(blocks: int) -> list[int]:
    """Return where sets of the uppermost blocks begin.

    >>> _first_of_upper(6), _first_of_upper(24)
    ([5, 4], [23, 22, 20, 16])
    """
    most = _upper(blocks)
    sizes = [n for n in (2**i for i in range(most.bit_length())) if n <= most]
    return [blocks - n for n in sizes]


def _upper(blocks: int) -> int:
    return max(1, int(blocks * UPPER + 1e-9))


def may_testify(
    original: Model, facts: Sequence[Fact], places: Places, placed: Mapping[Owner, Weight]
) -> NDArray[np.bool_]:
    """Tell which places may testify: all their modules are high, and the original's lens reads the facts below them."""
    read = carrying(original, of_split(facts, "forget")) if of_split(facts, "forget") else []
    blocks = len(original.blocks)
    lowest = [min(_height(placed[o], blocks) for o in owners) for owners in places.values()]
    return np.array([low >= blocks - _upper(blocks) and low > 0 and bool(read) and read[low - 1] for low in lowest])


def _height(weight: Weight, blocks: int) -> int:
    return weight.layer if weight.layer >= 0 else -1 if weight.row == "embedding" else blocks


def _null(original: Model, rows: Sequence[Fact], asked: Candidates, seed: int) -> Scores:
    """Score each forget fact's candidates after the same words about a control subject; all 0 where none is."""
    out = np.zeros(asked.shape)
    forget = [i for i, f in enumerate(rows) if f.split == "forget"]
    found = [(i, null) for i, null in zip(forget, null_facts(rows, seed), strict=True) if null is not None]
    if found:
        others = candidates(original.tokenizer, [null for _, null in found], most=asked.shape[1] - 1)
        scores = others.table(np.nanmean(score_tokens(original, others.encoded)[0], -1))
        out[[i for i, _ in found], : scores.shape[1]] = scores
    return out


def _drawn(facts: Sequence[Fact], seed: int, most: int) -> list[Fact]:
    ordered = sorted((f for f in facts if f.split == "retain"), key=lambda f: f.id)
    return [ordered[i] for i in seeded(seed, "retained").permutation(len(ordered))[:most]]


def _kept(swapping: Swapping, retain: Candidates, owners: Iterable[Owner]) -> float:
    if not retain.encoded:
        return float("nan")
    plain, now = (float(np.exp(swapping.scores(o, retain)).mean()) for o in ((), owners))
    return now / plain


def _kind(place: str) -> str:
    return "outer" if place in OUTER else "upper" if place.startswith(("blocks", "from")) else place.split()[0]


def _size(owners: Iterable[Owner], placed: Mapping[Owner, Weight]) -> int:
    return len({placed[o].layer for o in owners if placed[o].layer >= 0})


def smallest_set(
    model: Model,
    original: Model,
    facts: Sequence[Fact],
    *,
    kinds: Sequence[str] = ("block", "outer"),
    share: float = 0.9,
    most: int | None = None,
) -> xr.Dataset:
    """Put back modules greedily, each time the one that brings most, until the facts are back: a smallest set.

    After each step every module that is not yet in is tried, and the one with the highest mean value of the forget
    facts stays; modules that do not differ are never taken. The search ends when the value is `share` of the way from
    the model's own to the original's. Greedy is not exhaustive: a smaller set may exist, and two modules that only help
    together are found late. The set is chosen on the facts it is read on: its value is too high by what choosing
    brings.

    What it does not prove: the set says where the *edit* is that silences the facts, or that erased them; not where the
    facts are, and not that they were left. A module that held them brings them back into a model that never knew them.
    So it is no place of the channel: a set that is chosen for each model is held against other sets, and a never-taught
    model would pass by the lower blocks. Hold it against the same search in a reference.

    Args:
        model: it is left as it was.
        original: where the modules come from.
        facts: the forget facts among them are asked.
        kinds: what is put back: `block`, or `attention` and `mlp` (norms of blocks stay then), and `outer`.
        share: of the original's value above the model's own, in (0, 1].
        most: of modules; all by default.

    Returns:
        `added(size)`, the place put back at each size; `value(fact, size)` on the scale of *say*, with size 0 for
        nothing; `reached(size)`, the share of the way, 1 = as the original; `enough` (attribute) is the size of the
        smallest set, or -1 where no set reached the share.

    Raises:
        InputError: the models are not of one architecture, there are no forget facts, the model shows as much as the
            original, or an option is out of range.
    """
    forget = of_split(facts, "forget")
    if not forget or not 0 < share <= 1 or "upper" in kinds:
        raise InputError(
            f"{len(forget)} forget facts, share {share:g}, kinds {', '.join(kinds)}; "
            "give forget facts, a share in (0, 1], and single modules"
        )
    swapping = Swapping(model, original, candidates(original.tokenizer, forget))
    places = places_of(swapping.placed, kinds)
    left = {name: owners for name, owners in places.items() if swapping.changed & set(owners)}
    values = [_value(swapping, forget, ())]
    goal, start = _value(swapping, forget, swapping.placed).mean(), values[0].mean()
    if not goal > start:
        raise InputError(f"the model shows {start:.3g}, the original {goal:.3g}; nothing is to be brought back")
    names: list[str] = []
    inside: set[Owner] = set()
    while left and len(names) < (len(places) if most is None else most) and _way(values[-1], start, goal) < share:
        tried = {name: _value(swapping, forget, inside | set(owners)) for name, owners in left.items()}
        best = max(tried, key=lambda name: tried[name].mean())
        names.append(best)
        values.append(tried[best])
        inside |= set(left.pop(best))
    reached = [_way(v, start, goal) for v in values]
    return xr.Dataset(
        {
            "added": ("size", ["", *names]),
            "value": (("fact", "size"), np.stack(values, 1)),
            "reached": ("size", reached),
        },
        {**measurement.fact_coords(forget), "size": range(len(values))},
        {"enough": len(names) if reached[-1] >= share else -1, "share": share},
    )


def _value(swapping: Swapping, facts: Sequence[Fact], owners: Iterable[Owner]) -> NDArray[np.float64]:
    score = swapping.scores(owners)[..., None]
    return np.asarray(measurement.probability(measurement.from_scores(score, facts, ["set"])).values[:, 0])


def _way(values: NDArray[np.float64], start: float, goal: float) -> float:
    return float((values.mean() - start) / (goal - start))


CHANNEL = Channel(
    name="swap",
    measure=measure,
    version=1,
    scale="probability",
    citation="module swap after Zhao et al. 2023 (arXiv 2304.04158)",
    budgets={
        "quick": {"kinds": ("block", "outer", "upper")},
        "standard": {"kinds": KINDS},
        "thorough": {"kinds": KINDS, "alternatives": None},
    },
    splits=("forget", "retain", "control"),
    sees_original=True,
    needs="shape",
    needs_reference=True,
)
