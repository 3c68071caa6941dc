"""All figures of one audit, by name."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from lethescope.analyses.patch import erased_share
from lethescope.analyses.verdict import MARGIN
from lethescope.figures import curves, layers, residue


def of_audit(
    verdict: Mapping[str, Any], measurements: Mapping[tuple[str, str], xr.Dataset], *, width: str | float = "report"
) -> dict[str, Figure]:
    """Draw every figure that an audit allows: the residues, one a channel with layers or steps, and a map.

    A channel is drawn over its layers where its places have the coordinate ``layer``, as a curve where they have
    ``step``. The null of a layered channel is the first reference, else the channel's own null, else control facts.

    Args:
        verdict: the dictionary of ``verdict.json``.
        measurements: (channel, role) to Measurement.
        width: preset name of `lethescope.figures.style.WIDTHS`, or inches.

    Returns:
        Name to figure: ``residue``, the names of channels, and ``erasure`` where the channel patch was run.
    """
    drawn = {"residue": residue.paper(verdict, width=width, margin=verdict.get("margin", MARGIN))}
    for channel in dict.fromkeys(name for name, _ in measurements):
        of_roles = {role: ds for (name, role), ds in measurements.items() if name == channel}
        if not {"original", "unlearned"} <= of_roles.keys() or "place" not in of_roles["original"].dims:
            continue  # a section, which has its own figure
        if not np.isfinite(of_roles["original"]["score"]).any():
            continue
        if "layer" in of_roles["original"].coords:
            null, name = _null_of(of_roles)
            pair = of_roles["original"], of_roles["unlearned"]
            drawn[channel] = layers.paper(*pair, null, null_name=name, width=width)
            if "null_score" in pair[0] and null is not None:
                drawn["erasure"] = layers.erasure_map(erased_share(*pair, null["score"]), width=width)
        elif "step" in of_roles["original"].coords:
            drawn[channel] = curves.paper(of_roles, width=width)
    return drawn


def _null_of(of_roles: Mapping[str, xr.Dataset]) -> tuple[xr.Dataset | None, str]:
    """Return what a layered channel is held against, and its name; None stands for its control facts."""
    if "reference-0" in of_roles:
        return of_roles["reference-0"], "reference"
    original = of_roles["original"]
    if "null_score" in original and np.isfinite(original["null_score"]).any():
        return original.assign(score=original["null_score"]), "control subjects"
    return None, ""
