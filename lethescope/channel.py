"""What a channel is: a function that measures one model, and the few facts the audit must know about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import xarray as xr

BUDGETS = ("quick", "standard", "thorough")


@dataclass(frozen=True)
class Channel:
    """One way in which knowledge could still be read or brought back.

    Attributes:
        name: the word used everywhere (`say`, `lens` …).
        measure: `(model, facts, *, original, seed, **options) -> Dataset` with `score(fact, candidate, place)`.
        version: raised whenever the numbers change, so that stored cells are not mixed.
        scale: how a score becomes a value (`lethescope.measurement.value`); `difference` of sections, which have none.
        citation: where the instrument comes from.
        budgets: options of `measure` for each budget.
        splits: the splits that `measure` is given; references and planted controls are given no control split.
        sees_original: True when `measure` looks at the original too, beside the model in question.
        needs: what the two models must share before the channel can be run: `shape` (blocks, width and vocabulary)
            or nothing.
        needs_reference: True when the channel's other nulls are too low: without a reference it is shown, and may
            neither decide nor vote.
    """

    name: str
    measure: Callable[..., xr.Dataset]
    version: int
    scale: Literal["probability", "preference", "difference"]
    citation: str
    budgets: Mapping[str, Mapping[str, Any]]
    splits: tuple[str, ...] = ("forget", "control")
    sees_original: bool = False
    needs: Literal["", "shape"] = ""
    needs_reference: bool = False


def every_budget(**options: Any) -> dict[str, dict[str, Any]]:
    """Return the same options for every budget."""
    return dict.fromkeys(BUDGETS, options)
