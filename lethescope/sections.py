"""Report sections: instruments that show how a model came to work otherwise, beside the verdict.

They testify to nothing: none of them says whether a fact is still held. A section is measured on the original, the
unlearned model and the references; never on planted copies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from lethescope.analyses import emphasis, heads
from lethescope.cells import NotMeasured
from lethescope.channel import Channel, every_budget
from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.figures import attribution as attribution_figure
from lethescope.figures import heads as heads_figure
from lethescope.figures import horizon as horizon_figure
from lethescope.models import Model
from lethescope.probes import attribution, horizon, needles, retrieval_heads

Numbers = dict[str, float]
LENGTHS, DEPTHS = (256, 512), (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the needles: two at each length, in tokens, and depth."""


@dataclass(frozen=True)
class Section:
    """An instrument with its figure, and what it says of a model beside the original.

    Attributes:
        probe: how it is measured; its scale and its nulls are not used.
        compare: (original's Measurement, another's) -> named numbers.
        draw: role -> Measurement to a figure.
    """

    probe: Channel
    compare: Callable[[xr.Dataset, xr.Dataset], Numbers]
    draw: Callable[[Mapping[str, xr.Dataset]], Figure]


def in_numbers(measured: Mapping[tuple[str, str], xr.Dataset]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return section -> role -> what `compare` says of the role beside the original, None where it is not known.

    A model that cannot be held beside the original (other heads, other layers) is left out.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, role in measured:
        if name not in SECTIONS or role == "original" or (name, "original") not in measured:
            continue
        try:
            numbers = SECTIONS[name].compare(measured[name, "original"], measured[name, role])
        except InputError:
            continue
        found.setdefault(name, {})[role] = {k: _known(v) for k, v in numbers.items()}
    return found


def _known(x: float) -> float | None:
    return round(float(x), 4) if np.isfinite(x) else None


def _attribution(model: Model, facts: Sequence[Fact], *, seed: int) -> xr.Dataset:
    return attribution.measure(model, facts, seed=seed)


def _compare_attribution(before: xr.Dataset, after: xr.Dataset) -> Numbers:
    found = emphasis.compare(before, after)
    return {name: float(found[name].mean()) for name in ("spearman", "jaccard", "keyword_mass", "top1_agreement")}


def _horizon(model: Model, facts: Sequence[Fact], *, seed: int) -> xr.Dataset:
    return horizon.measure(model, facts, score="logprob")


def _compare_horizon(before: xr.Dataset, after: xr.Dataset) -> Numbers:
    """Return the largest mean information over layers and the median horizon, of forget facts."""
    found = {}
    for name, ds in (("before", before), ("after", after)):
        forget = ds.isel(fact=np.flatnonzero(ds["split"].values == "forget"))
        found[f"information {name}"] = float(forget["group"].mean("fact").max())
        found[f"horizon {name}"] = float(horizon.horizon(forget, "group").median())
    return found


def _retrieval_heads(model: Model, facts: Sequence[Fact], *, seed: int) -> xr.Dataset:
    asked = needles.key_value_needles(model.tokenizer, lengths=LENGTHS, depths=DEPTHS, each=2, seed=seed)
    return retrieval_heads.measure(model, asked, seed=seed)


def _compare_heads(before: xr.Dataset, after: xr.Dataset) -> Numbers:
    told = heads.compare(before, after)
    shares = dict(zip(("share_ge_0.1 before", "share_ge_0.1 after"), told["share_ge_0.1"], strict=True))
    return {name: told[name] for name in ("pearson", "spearman", "jaccard_top30")} | shares


def _draw_heads(measured: Mapping[str, xr.Dataset]) -> Figure:
    pair = {role: heads.mean_scores(ds) for role, ds in measured.items() if role in {"original", "unlearned"}}
    return heads_figure.paper(pair, width="report")


def _probe(name: str, measure: Callable[..., xr.Dataset], splits: tuple[str, ...], citation: str) -> Channel:
    def asked(model: Model, facts: Sequence[Fact], *, original: Model, seed: int) -> xr.Dataset:
        try:
            return measure(model, facts, seed=seed)
        except InputError as error:  # the instrument does not suit these models or facts
            raise NotMeasured(str(error)) from error

    return Channel(name, asked, 1, "difference", citation, every_budget(), splits)


SECTIONS: dict[str, Section] = {
    "attribution": Section(
        _probe("attribution", _attribution, ("forget",), emphasis.CITATION),
        _compare_attribution,
        partial(attribution_figure.paper, width="report"),
    ),
    "horizon": Section(
        _probe("horizon", _horizon, ("forget", "control"), horizon.CITATION),
        _compare_horizon,
        partial(horizon_figure.paper, width="report"),
    ),
    "retrieval-heads": Section(
        _probe("retrieval-heads", _retrieval_heads, ("forget",), retrieval_heads.CITATION), _compare_heads, _draw_heads
    ),
}
"""Every section by name."""
