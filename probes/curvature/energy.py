"""Where the inputs of a linear map lie among a population's directions: axes, and energy per band. Forward only."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.measurement import fact_coords, to_json
from lethescope.models import Model
from lethescope.probes.curvature.basis import CITATION, map_coords, principal
from lethescope.probes.curvature.maps import (
    LinearMap,
    Passage,
    Positions,
    Rows,
    Text,
    digest,
    digest_of,
    forward,
    linear_maps,
    passages,
)

Axes = Mapping[str, Float[Tensor, "q q"]]
"""name of a map -> orthonormal columns, the direction of most energy in a population first."""


def axes(
    model: Model,
    texts: Sequence[Text],
    *,
    maps: Sequence[LinearMap] | None = None,
    positions: Positions | None = None,
    rows: int = 32,
) -> dict[str, Float[Tensor, "q q"]]:
    """Find the directions of a population's inputs: eigenvectors of `A = mean x x^T`, without any gradient.

    The same A as of plain `factors`. Take the original model and ordinary text; what is to be judged must not be in it.
    A map needs at least as many tokens as it has inputs, or its flat directions are drawn by lot.

    Args:
        model: any language model, adapters merged.
        texts: the population.
        maps: by default the MLPs of all blocks.
        positions: text -> positions that count; by default all but the last (of facts: those that predict the answer).
        rows: texts at a time.

    Returns:
        name of the map -> (q, q), columns by falling eigenvalue, float64.

    Raises:
        InputError: there are fewer tokens than inputs (the map is named), or a text is too short.
    """
    chosen = linear_maps(model) if maps is None else tuple(maps)
    sums: dict[str, Tensor] = {}
    last: list[Tensor] = []

    def add(at: LinearMap, _some: Rows, x: Float[Tensor, "row q"]) -> None:
        if not last or last[0] is not x:
            last[:] = [x, x.mT @ x]
        sums[at.name] = sums.get(at.name, 0) + last[1].double()

    read = passages(model.tokenizer, texts, positions)
    tokens = sum(len(p.positions) for p in read)
    wide = max(chosen, key=lambda m: m.shape[1])
    if tokens < wide.shape[1]:
        raise InputError(f"{tokens} tokens cannot tell the {wide.shape[1]} directions of {wide.name}; give more text")
    forward(model, dict(enumerate(read)), chosen, add, rows)
    out: dict[str, Tensor] = {}
    for m in chosen:  # maps that share their input share its directions
        same = next((out[name] for name in out if torch.equal(sums[name], sums[m.name])), None)
        out[m.name] = principal(sums[m.name], f"A of {m.name}")[1] if same is None else same
    return out


def random_axes(axes: Axes, seed: int = 0) -> dict[str, Float[Tensor, "q q"]]:
    """Draw other orthonormal columns of the same shapes: the null, which knows nothing of the population.

    >>> drawn = random_axes({"map": torch.eye(3)})["map"]
    >>> bool(torch.allclose(drawn.mT @ drawn, torch.eye(3), atol=1e-6))
    True
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.linalg.qr(torch.randn(v.shape, dtype=v.dtype, generator=generator))[0].to(v.device)
        for name, v in axes.items()
    }


def bands(
    model: Model,
    texts: Sequence[Text],
    axes: Axes,
    *,
    maps: Sequence[LinearMap] | None = None,
    edges: Sequence[float] = (0.1, 0.25, 0.5),
    positions: Positions | None = None,
    rows: int = 32,
) -> xr.Dataset:
    """Measure which share of the inputs' energy lies in which band of the population's directions.

    `sum_t |V_band^T x_t|^2 / sum_t |x_t|^2`, bands by falling eigenvalue of the population's A: by default the top 10 %
    of directions, 10 to 25, 25 to 50 and the bottom 50 % (arXiv 2510.24256, which takes ratios of mean norms). Texts
    learned by heart lean to the bottom. So does, in gradients, predictable text that was not learned: a share says what
    a text runs through, only removing the band says whether the model needs it there.

    Args:
        model: any language model with the maps of `axes`.
        texts: facts keep their split, so that forget, retain and control are a `groupby` away.
        axes: of the *original* model, for every model that is compared.
        maps: by default the MLP maps that `axes` names.
        edges: where bands end, as shares of the directions.
        positions: as for `axes`.
        rows: texts at a time.

    Returns:
        `share(fact, map, band)`, in [0, 1], 1 over all bands; `energy(fact, map)`, mean `|x|^2` of a token.

    Raises:
        InputError: edges do not rise within (0, 1), or as for `axes`.
    """
    if list(edges) != sorted(set(edges)) or not all(0 < e < 1 for e in edges):
        raise InputError(f"band edges {list(edges)} must rise within (0, 1)")
    chosen = of_axes(model, axes, maps)
    ends = [0.0, *edges, 1.0]
    membership = {m.name: _membership(m.shape[1], ends).to(axes[m.name]) for m in chosen}
    read = passages(model.tokenizer, texts, positions)
    energy = energies(model, read, axes, membership, chosen, rows)
    tokens = np.array([len(p.positions) for p in read])
    whole = energy.sum(-1)
    names = [f"{low:.0%} to {high:.0%}" for low, high in pairwise(ends)]
    data = {
        "share": (("fact", "map", "band"), energy / np.where(whole > 0, whole, np.nan)[..., None]),
        "energy": (("fact", "map"), whole / tokens[:, None]),
    }
    ds = labelled(model, texts, read, chosen, data, axes, "curvature_bands", edges=list(edges))
    return ds.assign_coords(band=names)


def _membership(width: int, ends: Sequence[float]) -> Float[Tensor, "q band"]:
    cuts = [round(end * width) for end in ends]
    place = torch.arange(width)[:, None]
    return ((place >= torch.tensor(cuts[:-1])) & (place < torch.tensor(cuts[1:]))).double()


def energies(
    model: Model,
    read: Sequence[Passage],
    axes: Axes,
    weights: Mapping[str, Float[Tensor, "q k"]],
    maps: Sequence[LinearMap],
    rows: int,
) -> Float[np.ndarray, "text map k"]:
    """Sum weighted energies of inputs along axes, `sum_t sum_j (v_j^T x_t)^2 R_jk`, for text, map and column k."""
    number = {m.name: i for i, m in enumerate(maps)}
    out = torch.zeros(len(read), len(maps), next(iter(weights.values())).shape[1], dtype=torch.float64)

    def add(at: LinearMap, some: Rows, x: Float[Tensor, "row q"]) -> None:
        found = (x @ axes[at.name].to(x)).square() @ weights[at.name].to(x)
        out[:, number[at.name]].index_add_(0, some.owner, found.double().cpu())

    forward(model, dict(enumerate(read)), maps, add, rows)
    return out.numpy()


def of_axes(model: Model, axes: Axes, maps: Sequence[LinearMap] | None) -> tuple[LinearMap, ...]:
    """Return the maps that are read: those given, or the MLP maps that have axes.

    Raises:
        InputError: a map has no axes, or axes of another width.
    """
    chosen = tuple(m for m in linear_maps(model) if m.name in axes) if maps is None else tuple(maps)
    if not chosen:
        raise InputError(f"the axes are of {', '.join(axes)}, which are no MLP maps of the {model.role} model")
    for m in chosen:
        if m.name not in axes:
            raise InputError(f"there are no axes for map {m.name}; there are for {', '.join(axes)}")
        if len(axes[m.name]) != m.shape[1]:
            raise InputError(f"map {m.name} has {m.shape[1]} inputs and its axes {len(axes[m.name])} rows")
    return chosen


def labelled(
    model: Model,
    texts: Sequence[Text],
    read: Sequence[Passage],
    maps: Sequence[LinearMap],
    data: Mapping[str, Any],
    axes: Axes,
    probe: str,
    **parameters: Any,
) -> xr.Dataset:
    """Label arrays over (fact, map …) with where they come from."""
    facts = [text for text in texts if isinstance(text, Fact)]
    coords = fact_coords(facts) if len(facts) == len(texts) else {"fact": [f"text {i}" for i in range(len(texts))]}
    return xr.Dataset(dict(data), {**coords, **map_coords(maps)}).assign_attrs(
        probe=probe,
        version=1,
        parameters=to_json({**parameters, "axes": digest_of(axes[m.name] for m in maps)}),
        model=model.fingerprint,
        facts=digest(read),
        dtype=str(model.dtype),
        device=str(model.device),
        seed=0,
        citation=CITATION,
        units="share of energy",
        scale="share",
    )
