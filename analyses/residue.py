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
from jaxtyping import Float
from numpy.typing import NDArray

from lethescope.measurement import value
from lethescope.statistics import Interval, cluster_weights, crossfit_place, folds, interval, p_above_zero

DRAWS = 4000
SHOWS = 0.5
"""A place counts only where the original shows at least this share of the most it shows anywhere."""
LEAST_SIGNAL = 0.1
"""A channel is testable when the original's mean value is above its null by this much."""

Array = Float[NDArray[np.float64], "fact place"]


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
    and the channel's own null (`null_score`). Control subjects are dealt into folds too, so that a place is not chosen
    because the control facts that it is read against happen to be low there. Intervals are percentile bootstrap over
    subjects (forget and control drawn apart), given the chosen places.

    Args:
        measured: role -> Measurement with `score(fact, candidate, place)`.
        role: the role in question.
        seed: of folds and bootstrap.
        channels: for how many channels the `simultaneous` interval must hold at once (Bonferroni).
        level: of the intervals.

    Returns:
        The residue; not testable, with NaN, where the original itself shows nothing or no fact has a value.
    """
    table = _Table.of(measured, role, seed)
    if table is None:
        return _untestable(measured, role)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means over places where nothing was measured
        gain_original = table.excess("original")
        mean = np.nanmean(gain_original, 0)
        allowed = np.isfinite(mean) & (mean >= SHOWS * np.nanmax(mean))
        place = crossfit_place(table.excess(role), table.fold, allowed)
        drawn = table.draw(role, place, seed), table.draw("original", place, seed)
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
        p_above_zero(draws[0]),
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
    seed: int

    @classmethod
    def of(cls, measured: Mapping[str, xr.Dataset], role: str, seed: int) -> "_Table | None":
        base = measured["original"]
        values = {name: value(ds).transpose("fact", "place") for name, ds in measured.items()}
        forget = {name: v.where(v["split"] == "forget", drop=True) for name, v in values.items()}
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
        control = {name: v.where(v["split"] == "control", drop=True) for name, v in values.items()}
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
            seed,
        )

    @property
    def fold(self) -> NDArray[np.intp]:
        """The fold of each forget fact."""
        return folds(self.subjects, self.seed)

    def control_level(self, role: str) -> Array:
        """Mean of the control facts of each fact's own fold, per place; of all of them where the fold has none."""
        control, subjects = self.control[role]
        dealt = folds(subjects, self.seed)
        level = {f: np.nanmean(control[dealt == f] if (dealt == f).any() else control, 0) for f in set(self.fold)}
        return np.stack([level[f] for f in self.fold])

    def nulls(self, role: str) -> list[tuple[str, Array]]:
        """Every null there is, as (name, per fact and place); the control split's is one level for each fold."""
        level = self.control_level(role) if len(self.control[role][0]) else None
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

    def draw(self, role: str, place: NDArray[np.intp], seed: int) -> Float[NDArray[np.float64], " draw"]:
        """Mean excess at the chosen places: the estimate first, then bootstrap draws."""
        rows = np.arange(len(place))
        gain = self.excess(role)[rows, place]
        weights = np.concatenate([np.ones((1, len(rows))), cluster_weights(self.subjects, seed, DRAWS)])
        known = np.isfinite(gain)
        weights = weights * known
        mean = weights @ np.nan_to_num(gain) / weights.sum(1)
        control, subjects = self.control[role]
        held = np.array(self.strongest(role))[place] == "control"
        if not held.any():
            return mean
        again = np.concatenate([np.ones((1, len(control))), cluster_weights(subjects, seed + 1, DRAWS)])
        dealt = folds(subjects, self.seed)
        for p in np.unique(place[held & known]):
            read = held & known & (place == p)
            there = np.isfinite(control[:, p])
            there &= np.isin(dealt, self.fold[read]) if np.isin(dealt[there], self.fold[read]).any() else True
            level = again[:, there] @ control[there, p] / again[:, there].sum(1)
            mean = mean - read.sum() / known.sum() * (level - level[0])
        return mean

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


def _untestable(measured: Mapping[str, xr.Dataset], role: str) -> Residue:
    nothing = Interval(float("nan"), float("nan"), float("nan"))
    empty = pd.DataFrame({name: [] for name in ("fact", "role", "value", "null", "residue")})
    return Residue(nothing, nothing, float("nan"), nothing, {}, False, 0, (), empty)
