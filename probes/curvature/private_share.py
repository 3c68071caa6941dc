"""Private share: how much of what a text does in a linear map runs through directions that the population hardly uses.

A text that was learned by heart leans on flat directions of the population's inputs, and a forward pass shows it.
"""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from lethescope.errors import InputError
from lethescope.models import Model
from lethescope.probes.curvature.energy import Axes, energies, labelled, of_axes
from lethescope.probes.curvature.maps import LinearMap, Positions, Text, passages


def measure(
    model: Model,
    texts: Sequence[Text],
    axes: Axes,
    *,
    maps: Sequence[LinearMap] | None = None,
    flat: float = 0.6,
    positions: Positions | None = None,
    rows: int = 32,
) -> xr.Dataset:
    """Measure the share of a map's output energy that comes from the population's flattest input directions.

    `sum_t sum_{j flat} |W v_j|^2 (v_j^T x_t)^2 / sum_t sum_j |W v_j|^2 (v_j^T x_t)^2`, v_j the eigenvectors of the
    population's `A = mean x x^T` and flat the last `flat` of them (smarter/memorization_kfac, an unreviewed replication
    of arXiv 2510.24256, which tells memorised windows of OLMo-2 7B with an AUC of 0.99 in its late layers).

    What it does not prove: that a text with a high share was learned by heart. Arithmetic scores high too, and so does
    any text unlike the population: in the model of our tests, random words that were never seen score above its
    language with an AUC of 0.8 to 0.95. So hold it against texts *of the same kind* that were never taught. Nor does it
    tell how readily a text is said. A share that falls after unlearning says that the inputs moved, not that the
    weights forgot. The null is `random_axes`: the mean AUC of many draws is near 0.5, one draw may be far off.

    Args:
        model: any language model with the maps of `axes`; W is its own.
        texts: facts (the positions that predict their answers), strings, token ids or `Encoded`.
        axes: `lethescope.probes.curvature.energy.axes` of the *original* model on retain or neutral text, the same for
            every model that is compared.
        maps: by default the MLP maps that `axes` names.
        flat: share of the directions that count as flat.
        positions: text -> positions that are read.
        rows: texts at a time.

    Returns:
        `score(fact, map)` in [0, 1], higher = more private; NaN where a map puts out nothing. Coordinates `layer`,
        `part`, `kind` of the maps; `groupby("layer").mean()` gives one number a layer.

    Raises:
        InputError: `flat` takes no or every direction, a map has no axes, or a text is too short.

    Example:
        >>> from lethescope.probes.curvature.maps import linear_maps
        >>> from lethescope.subjects.handmade import handmade
        >>> made = handmade()  # each fact is one input direction of block 1; say that the last 40 of 80 are flat
        >>> (gate, *_) = linear_maps(made.original, layers=[1])
        >>> ds = measure(made.original, made.facts[2:6], {gate.name: torch.eye(80)}, maps=[gate], flat=0.5)
        >>> ds["score"].values[:, 0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    chosen = of_axes(model, axes, maps)
    weights = {}
    for m in chosen:
        width = m.shape[1]
        cut = width - round(flat * width)
        if not 0 < cut < width:
            raise InputError(f"flat is {flat}; of the {width} directions of {m.name}, some must be flat and some not")
        gain = (m.weight.to(axes[m.name]) @ axes[m.name]).square().sum(0)
        weights[m.name] = torch.stack([gain * (torch.arange(width, device=gain.device) >= cut), gain], -1)
    read = passages(model.tokenizer, texts, positions)
    private, every = np.moveaxis(energies(model, read, axes, weights, chosen, rows), -1, 0)
    score = private / np.where(every > 0, every, np.nan)
    data = {"score": (("fact", "map"), score)}
    return labelled(model, texts, read, chosen, data, axes, "private_share", flat=flat)
