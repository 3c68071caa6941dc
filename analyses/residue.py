"""Residue: what a channel still finds in the unlearned model, as a share of what it finds in the original.

The place where a channel looks (a layer, a bit width, a learning rate) is chosen on other subjects than those it is
read on, for every model alike, and what is found where there is nothing to find is taken off first.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int
from numpy.typing import NDArray

from lethescope.measurement import value
from lethescope.statistics import Interval, cluster_weights, folds, interval, p_above_zero

DRAWS = 4000
SHOWS = 0.5
"""A place counts only where the original shows at least this share of the most it shows anywhere."""
LEAKS = 0.2
"""A place counts only where the references show at most this share of what the original shows: elsewhere a model that
never held the facts may show more than they do, and by more than the verdict's margin."""
LEAST_SIGNAL = 0.1
"""A channel is testable when the original's mean value is above its null by this much."""

Array = Float[NDArray[np.float64], "*rest place"]
Places = Int[NDArray[np.intp], "*rest"]


@dataclass(frozen=True)
class Residue:
    """A channel's residue with everything that it was held against."""

    residue: Interval
    simultaneous: Interval
    p_value: float
    original: Interval
    null: dict[str, float]
    testable: bool
    n_facts: int
    places: tuple[str, ...]
    rows: pd.DataFrame = field(repr=False)


def residue(
    measured: Mapping[str, xr.Dataset],
    *,
    role: str = "unlearned",
    seed: int = 0,
    channels: int = 1,
    level: float = 0.95,
) -> Residue:
    """Take one channel's Measurements of all roles and return the residue of `role`.

    With v the value of a fact at a place and n the null there, the excess is e = v - n, and the residue is
    `sum_i e_role(i) / sum_i e_original(i)` over forget facts: 0 = as if never taught, 1 = as in the original. The null
    of a place is the highest of: the mean of the references on the same facts, the same model's mean on control facts,
    and the channel's own null (`null_score`). Intervals are percentile bootstrap over subjects (forget and control
    drawn apart), and the place is chosen anew in every draw: choosing is part of what varies. The p-value is
    the larger of the percentile and the basic (reflected) bootstrap's: choosing moves them apart.

    Args:
        measured: role -> Measurement with `score(fact, candidate, place)`.
        role: the role in question.
        seed: of folds and bootstrap.
        channels: for how many channels the `simultaneous` interval must hold at once (Bonferroni).
        level: of the intervals.

    Returns:
        The residue; not testable, with NaN, where the original itself shows nothing, the references show too much
        everywhere (`LEAKS`), or no fact has a value.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means over places where nothing was measured
        table = _Table.of(measured, role)
        if table is None:
            return _untestable()
        gain_original = table.excess("original")
        mean = np.nanmean(gain_original, 0)
        allowed = np.isfinite(mean) & (mean >= SHOWS * np.nanmax(mean)) & table.tight()
        if not allowed.any():
            return _untestable()
        fold = folds(table.subjects, seed)
        chosen = table.choose(role, fold, allowed, seed)
        place = chosen[0, fold]
        drawn = table.draw(role, fold, chosen, seed), table.draw("original", fold, chosen, seed)
    estimates = [d[0] for d in drawn]
    draws = [d[1:] for d in drawn]
    signal = interval(estimates[1], draws[1], level)
    testable = bool(signal.low > 0 and signal.estimate >= LEAST_SIGNAL)
    ratio, ratios = estimates[0] / estimates[1], draws[0] / np.where(draws[1] > 0, draws[1], np.nan)
    if not testable:
        ratio, ratios = float("nan"), np.array([])
    names = tuple(dict.fromkeys(table.places[p] for p in place))
    return Residue(
        interval(ratio, ratios, level),
        interval(ratio, ratios, 1 - (1 - level) / max(1, channels)),
        max(p_above_zero(draws[0]), p_above_zero(2 * estimates[0] - draws[0])),
        signal,
        table.null_levels(role, place),
        testable,
        len(table.subjects),
        names,
        table.rows(role, place),
    )


@dataclass(frozen=True)
class _Table:
    """Values of one channel laid out for the arithmetic: forget facts that have a value in every role."""

    facts: list[str]
    subjects: list[str]
    places: list[str]
    values: dict[str, Array]
    paired_null: Array | None
    own_null: Array | None
    control: dict[str, tuple[Array, list[str]]]

    @classmethod
    def of(cls, measured: Mapping[str, xr.Dataset], role: str) -> "_Table | None":
        base = measured["original"]
        asked = [name for name in measured if name in {"original", role} or name.startswith("reference")]
        values = {name: value(measured[name]).transpose("fact", "place") for name in asked}
        forget = {name: _of_split(v, "forget") for name, v in values.items()}
        references = [forget[name] for name in forget if name.startswith("reference") and name != role]
        shared = [p for p in forget["original"]["place"].values if all(p in v["place"].values for v in [forget[role]])]
        kept = forget["original"].sel(place=shared).notnull().any("place")
        kept &= forget[role].sel(place=shared).notnull().any("place").reindex_like(kept, fill_value=False)
        facts = [str(f) for f, keep in zip(kept["fact"].values, kept.values, strict=True) if keep]
        if not facts or not shared:
            return None

        def pick(v: xr.DataArray) -> Array:
            return np.asarray(v.reindex(fact=facts, place=shared).values, dtype=np.float64)

        own = value(base, "null_score").transpose("fact", "place") if "null_score" in base else None
        control = {name: _of_split(v, "control") for name, v in values.items()}
        stand_in = {role: role if control[role].sizes["fact"] else "original", "original": "original"}
        return cls(
            facts,
            [str(s) for s in forget["original"].sel(fact=facts)["subject"].values],
            [str(p) for p in shared],
            {role: pick(forget[role]), "original": pick(forget["original"])},
            np.nanmean([pick(r) for r in references], 0) if references else None,
            None if own is None else pick(own),
            {
                name: (
                    np.asarray(control[source].reindex(place=shared).values, dtype=np.float64),
                    [str(s) for s in control[source]["subject"].values],
                )
                for name, source in stand_in.items()
            },
        )

    def nulls(self, role: str) -> list[tuple[str, Array]]:
        """Every null there is, as (name, per fact and place); the control split's is one level for all facts."""
        shape = (len(self.facts), 1)
        control = self.control[role][0]
        level = np.tile(np.nanmean(control, 0), shape) if len(control) else None
        named = [("reference", self.paired_null), ("control", level), ("own", self.own_null)]
        return [(name, array) for name, array in named if array is not None and np.isfinite(array).any()]

    def strongest(self, role: str) -> list[str]:
        """Name, for each place, the null with the highest mean there."""
        nulls = self.nulls(role)
        if not nulls:
            return ["none"] * len(self.places)
        means = np.array([np.nan_to_num(np.nanmean(array, 0), nan=-np.inf) for _, array in nulls])
        return [nulls[i][0] for i in means.argmax(0)]

    def excess(self, role: str) -> Array:
        """Value minus null, per fact and place."""
        nulls = {**dict(self.nulls(role)), "none": np.zeros_like(self.values[role])}
        null = np.stack([nulls[name][:, p] for p, name in enumerate(self.strongest(role))], 1)
        return self.values[role] - np.where(np.isfinite(null), null, np.nanmean(null, 0))

    def tight(self) -> NDArray[np.bool_]:
        """Tell the places where the references show next to nothing of what the original shows; all without any."""
        if self.paired_null is None:
            return np.ones(len(self.places), dtype=bool)
        shown = np.nanmean(self.values["original"], 0)
        return np.asarray(np.nanmean(self.paired_null, 0) <= LEAKS * shown)

    def choose(self, role: str, fold: Places, allowed: NDArray[np.bool_], seed: int) -> Places:
        """Choose a place for each fold (draw fold): the allowed one with the highest mean over the other folds.

        Paired nulls are taken off first; the control level is not, because a place chosen where control facts happen
        to be low would then be flattered by the same control facts.
        """
        sums, counts, _ = self._weighted(role, fold, seed)
        best = []
        for f in range(sums.shape[1]):
            others = [g for g in range(sums.shape[1]) if g != f] or [f]
            mean = sums[:, others].sum(1) / counts[:, others].sum(1)
            best.append(np.where(allowed & np.isfinite(mean), mean, -np.inf).argmax(1))
        return np.stack(best, 1)

    def draw(self, role: str, fold: Places, chosen: Places, seed: int) -> Float[NDArray[np.float64], " draw"]:
        """Mean excess at the chosen places: the estimate first, then bootstrap draws."""
        sums, counts, level = self._weighted(role, fold, seed)
        draws, by_fold = np.arange(len(sums))[:, None], np.arange(sums.shape[1])
        n = counts[draws, by_fold, chosen]
        return (sums[draws, by_fold, chosen] - n * level[draws, chosen]).sum(1) / n.sum(1)

    def _weighted(self, role: str, fold: Places, seed: int) -> tuple[Array, Array, Array]:
        """Sums and counts of the values over paired nulls (draw fold place), and control levels (draw place)."""
        control, subjects = self.control[role]
        held = np.array([name == "control" for name in self.strongest(role)])
        gain = np.where(held, self.values[role], self.excess(role))
        known = np.isfinite(gain)
        weights = np.concatenate([np.ones((1, len(gain))), cluster_weights(self.subjects, seed, DRAWS)])
        mine = [fold == f for f in range(fold.max() + 1)]
        sums = np.stack([weights[:, m] @ np.nan_to_num(gain[m]) for m in mine], 1)
        counts = np.stack([weights[:, m] @ known[m].astype(float) for m in mine], 1)
        if not held.any():
            return sums, counts, np.zeros((len(weights), len(held)))
        again = np.concatenate([np.ones((1, len(control))), cluster_weights(subjects, seed + 1, DRAWS)])
        level = (again @ np.nan_to_num(control)) / (again @ np.isfinite(control).astype(float))
        return sums, counts, np.where(held, level, 0.0)

    def null_levels(self, role: str, place: NDArray[np.intp]) -> dict[str, float]:
        """Mean of each null at the chosen places, and which one was taken off."""
        rows = np.arange(len(place))
        levels: dict[str, float] = {name: float(np.nanmean(a[rows, place])) for name, a in self.nulls(role)}
        return {name: round(level, 6) for name, level in levels.items()}

    def rows(self, role: str, place: NDArray[np.intp]) -> pd.DataFrame:
        """Tidy rows (fact, role, value, null, residue) of the original and the role at the chosen places."""
        at = np.arange(len(place)), place
        parts = []
        original = self.excess("original")[at]
        for name in ("original", role):
            gain, seen = self.excess(name)[at], self.values[name][at]
            share = np.where(original > LEAST_SIGNAL, gain / np.where(original > LEAST_SIGNAL, original, 1), np.nan)
            parts.append(
                pd.DataFrame({"fact": self.facts, "role": name, "value": seen, "null": seen - gain, "residue": share})
            )
        return pd.concat(parts, ignore_index=True)


def _of_split(values: xr.DataArray, split: str) -> xr.DataArray:
    return values.isel(fact=np.flatnonzero(values["split"].values == split))


def _untestable() -> Residue:
    nothing = Interval(float("nan"), float("nan"), float("nan"))
    empty = pd.DataFrame({name: [] for name in ("fact", "role", "value", "null", "residue")})
    return Residue(nothing, nothing, float("nan"), nothing, {}, False, 0, (), empty)
