"""The delta of two models' weights: how large it is in which module, in which directions, and what lies on the way.

None of this says that a fact is held or gone. Where the weights moved is not where a memory was: the swap of modules
(`lethescope.analyses.swap`) is causal, a norm is not.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from einops import reduce
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lethescope import measurement
from lethescope.analyses.compress import round_to_nearest
from lethescope.analyses.modules import OUTER, Owner, Weight, aligned, holding, parameter, whole
from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.models import Model
from lethescope.scoring import candidates, score_tokens

FPF = "Zhao et al. 2023 (arXiv 2304.04158)"


def delta(
    original: Model, model: Model, *, bits: Sequence[int] = (4, 8), group: int = 64, values: int = 32
) -> xr.Dataset:
    """Hold the weights of two models of one architecture beside each other: D = W_model - W_original, weight by weight.

    `mean_change` is the module change of FPF (arXiv 2304.04158), `(1/n) ||D||_1`; `stable_rank` is
    `||D||_F^2 / ||D||_2^2` (Rudelson & Vershynin 2007, arXiv math/0503442): 1 for an edit along one direction, at most
    the smaller side. A bucket is the distance of two levels of the original's weights rounded to nearest as channel
    *compress* does it (symmetric, groups of inputs): `below_bucket` is the share of weights that moved by less than
    half of it, `same_level` the share of the weights that moved at all whose rounded value stayed within half of it.
    The nearer `same_level` is to 1, the more of the edit rounding undoes, which predicts what *compress* brings back.

    What it does not prove: a large change need not matter and a small one may (RMSNorm gains, one row of the
    unembedding). Nothing here says whether a fact is held.

    Args:
        original: the model before.
        model: the model after; adapters are merged into a copy.
        bits: of the rounding.
        group: weights that share a scale there.
        values: how many singular values of D are kept, largest first.

    Returns:
        One row a `weight` (a tied one once, where it stands first; both, if the models are not tied alike), with the
        coordinates `row`, `part`, `kind`, `layer` of `Weight`: `n`, `norm`, `norm_after`, `change` (Frobenius, >= 0),
        `relative_change` (change / norm; infinite where the original's is 0), `mean_change`; for matrices
        `stable_rank` (>= 1; NaN where nothing moved) and `spectrum(weight, rank)`; for the matrices in blocks
        `below_bucket(weight, bits)` and `same_level(weight, bits)`, both in [0, 1].

    Raises:
        InputError: the models are not of one architecture (the weight is named), or an option is out of range.
    """
    if group < 1 or values < 1 or any(b < 2 for b in bits):
        raise InputError(f"group {group}, values {values}, bits {tuple(bits)}; give group, values >= 1 and bits >= 2")
    before, after = whole(original), whole(model)
    placed = aligned(before, after)
    rows = {
        owner: _compared(_read(before, owner), _read(after, owner), at, bits, group, values)
        for owner, at in _once(placed, before, after)
    }
    dims: dict[str, tuple[str, ...]] = {"spectrum": ("weight", "rank")}
    dims |= dict.fromkeys(("below_bucket", "same_level"), ("weight", "bits"))
    names = next(iter(rows.values()))
    data = {name: (dims.get(name, ("weight",)), np.array([row[name] for row in rows.values()])) for name in names}
    told = {name: ("weight", [getattr(placed[o], name) for o in rows]) for name in ("row", "part", "kind", "layer")}
    coords = {"weight": [".".join(o) for o in rows], "bits": list(bits), "rank": np.arange(1, values + 1), **told}
    return xr.Dataset(data, coords, {"group": group, "citation": FPF})


def _read(module: Any, owner: Owner) -> Tensor:
    return parameter(module, owner).detach().float().cpu()


def _once(placed: Mapping[Owner, Weight], before: Any, after: Any) -> Iterator[tuple[Owner, Weight]]:
    """Yield every weight, one that is tied in both models where it stands first."""
    seen = set()
    for owner, at in placed.items():
        both = id(parameter(before, owner)), id(parameter(after, owner))
        if both not in seen:
            seen.add(both)
            yield owner, at


def _compared(
    before: Tensor, after: Tensor, at: Weight, bits: Sequence[int], group: int, values: int
) -> dict[str, Any]:
    if before.ndim == 2 and not at.outputs_first:
        before, after = before.mT, after.mT
    moved = after.double() - before.double()
    norm, change = before.double().norm().item(), moved.norm().item()
    found = singular_values(moved) if moved.ndim == 2 else np.array([])
    matrix = before.ndim == 2 and at.layer >= 0
    buckets = [_against_buckets(before, after, b, group) if matrix else (np.nan, np.nan) for b in bits]
    return {
        "n": before.numel(),
        "norm": norm,
        "norm_after": after.double().norm().item(),
        "change": change,
        "relative_change": change / norm if norm else (np.inf if change else 0.0),
        "mean_change": moved.abs().mean().item(),
        "stable_rank": change**2 / found[0] ** 2 if len(found) and change else np.nan,
        "spectrum": np.pad(found[:values], (0, max(0, values - len(found))), constant_values=np.nan),
        "below_bucket": [b[0] for b in buckets],
        "same_level": [b[1] for b in buckets],
    }


def singular_values(matrix: Float[Tensor, "p q"]) -> Float[NDArray[np.float64], " rank"]:
    """Return the singular values, largest first, from the Gram matrix of the smaller side in float64.

    Those below about 1e-8 of the largest are rounding error; a full decomposition of a large matrix takes many times as
    long.

    >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])).tolist()
    [4.0, 3.0]
    """
    matrix = matrix.double()
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    return np.asarray(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).numpy())


def buckets(weight: Float[Tensor, "out in"], bits: int, group: int) -> Float[Tensor, "out in"]:
    """Return for every weight the distance of two levels of `compress.round_to_nearest`, 0 where all are 0.

    >>> buckets(torch.tensor([[1.0, 0.4, -3.0, 0.1]]), 2, 2)
    tensor([[1., 1., 3., 3.]])
    """
    group = group if weight.shape[1] % group == 0 else weight.shape[1]
    top = 2 ** (bits - 1) - 1
    scale = reduce(weight.abs(), "out (n group) -> out n", "max", group=group) / top
    return scale.repeat_interleave(group, 1)


def _against_buckets(before: Tensor, after: Tensor, bits: int, group: int) -> tuple[float, float]:
    """Return the share of weights that moved by less than half a bucket, and of moved weights that kept their level."""
    half = buckets(before, bits, group) / 2
    moved = after != before
    rounded = [round_to_nearest(w, bits, group) for w in (before, after)]
    stayed = ((rounded[1] - rounded[0]).abs() < half)[moved]
    below = ((after - before).abs() < half) | ~moved
    return below.float().mean().item(), stayed.float().mean().item() if len(stayed) else np.nan


def change_map(found: xr.Dataset) -> xr.DataArray:
    """Gather a delta's relative change, `sqrt(sum D^2 / sum W^2)`, by row and kind of module.

    Returns:
        `(row, kind)`: rows are `embedding`, `block 0` …, `final norm`, `unembedding`, as the places of channel *swap*
        are named; kinds are the maps within a block, `norms` together, and, last, `all` of the row. NaN where a row has
        no such map.
    """
    rows = list(dict.fromkeys(str(r) for r in found["row"].values))
    blocks = [row for row in rows if row.startswith("block ")]
    rows = [*(["embedding"] if "embedding" in rows else []), *blocks, *(r for r in OUTER[1:] if r in rows)]
    of = [
        "norms" if part == "norms" else str(kind)
        for part, kind in zip(*(found[n].values for n in ("part", "kind")), strict=True)
    ]
    kinds = [*dict.fromkeys(kind for kind in of if kind not in OUTER), "all"]
    squares = np.zeros((2, len(rows), len(kinds)))
    names = zip(found["row"].values, of, found["change"].values, found["norm"].values, strict=True)
    for row, kind, change, norm in names:
        for column in [len(kinds) - 1, *([kinds.index(kind)] if kind in kinds else [])]:
            squares[:, rows.index(row), column] += change**2, norm**2
    share = np.sqrt(squares[0] / np.where(squares[1] > 0, squares[1], np.nan))
    return xr.DataArray(share, {"row": rows, "kind": kinds}, ("row", "kind"), "relative_change")


def activation_shares(moved: ArrayLike, vectors: ArrayLike, eigenvalues: ArrayLike, *, deciles: int = 10) -> xr.Dataset:
    """Share of a delta's energy along the inputs that carry most of the activation, and along those that carry least.

    With v_j the eigenvectors of the uncentred covariance of a map's inputs, `share` of a decile of directions is
    `sum_j ||D v_j||^2 / ||D||_F^2`. A delta without regard to the inputs has 1/deciles everywhere. `effect` is the same
    with every direction weighted by its eigenvalue: the decile's share of the mean squared change of the output.

    What it does not prove: much energy in minor directions says that typical inputs hardly meet the edit, not that the
    edit hides something; the inputs that the basis was made from decide what is minor.

    Args:
        moved: D (p, q), outputs first.
        vectors: (q, q), eigenvectors as columns.
        eigenvalues: (q,), of any order; below 0 counts as 0.
        deciles: how many groups of directions.

    Returns:
        `share(decile)`, `effect(decile)`, and `mass(decile)`, the share of the eigenvalues; each adds up to 1. Decile 1
        is dominant, the last one is minor.

    Raises:
        InputError: shapes do not fit, the vectors are not orthonormal, or there are fewer directions than deciles.
    """
    d, v, mass = (np.asarray(x, dtype=np.float64) for x in (moved, vectors, eigenvalues))
    _check_basis("vectors", v, mass, d.shape[-1] if d.ndim == 2 else 0)
    return _by_mass(((d @ v) ** 2).sum(0), mass.clip(0), deciles)


def curvature_shares(
    moved: ArrayLike,
    output_vectors: ArrayLike,
    output_values: ArrayLike,
    input_vectors: ArrayLike,
    input_values: ArrayLike,
    *,
    deciles: int = 10,
) -> xr.Dataset:
    """Share of a delta's energy by decile of curvature mass, in the eigenbases of K-FAC factors.

    With `G = U_G diag(lam) U_G^T` and `A = U_A diag(mu) U_A^T` (arXiv 2510.24256), `C = U_G^T D U_A` and a pair's mass
    is `lam_i mu_j`; `share` of a decile of pairs is `sum C_ij^2 / ||D||_F^2`, 1/deciles for a delta without regard to
    the loss; `effect` weights by mass: the decile's share of the loss's second-order change
    `sum lam_i mu_j C_ij^2 / 2`.

    This is curvature of the population's loss, which is low in the directions that memorised points use; the curvature
    at a single memorised point is high and is another instrument. What it does not prove: that an edit in sharp
    directions suppresses or one in flat directions erases.

    Args:
        moved: D (p, q), outputs first.
        output_vectors: U_G (p, p), columns.
        output_values: lam (p,).
        input_vectors: U_A (q, q), columns.
        input_values: mu (q,).
        deciles: how many groups of pairs.

    Returns:
        `share`, `effect`, `mass`, each `(decile)` and adding up to 1; decile 1 has the largest mass.

    Raises:
        InputError: as `activation_shares`.
    """
    d, u, lam, v, mu = (
        np.asarray(x, dtype=np.float64) for x in (moved, output_vectors, output_values, input_vectors, input_values)
    )
    p, q = d.shape if d.ndim == 2 else (0, 0)
    _check_basis("output_vectors", u, lam, p)
    _check_basis("input_vectors", v, mu, q)
    return _by_mass(((u.T @ d @ v) ** 2).ravel(), np.outer(lam.clip(0), mu.clip(0)).ravel(), deciles)


def _check_basis(name: str, vectors: NDArray[np.float64], values: NDArray[np.float64], side: int) -> None:
    if vectors.shape != (side, side) or values.shape != (side,) or not side:
        raise InputError(
            f"{name} are {vectors.shape} with eigenvalues {values.shape}; this side of the delta needs "
            f"({side}, {side}) and ({side},), eigenvectors as columns"
        )
    apart = np.abs(vectors.T @ vectors - np.eye(side)).max()
    if not apart < 1e-3:
        raise InputError(f"{name} are not orthonormal (off by {apart:.2g}); give the eigenvectors as columns")


def _by_mass(energy: NDArray[np.float64], mass: NDArray[np.float64], deciles: int) -> xr.Dataset:
    if not 1 <= deciles <= len(mass):
        raise InputError(f"{deciles} deciles of {len(mass)} directions; give at least 1 and at most so many")
    order = np.argsort(-mass, kind="stable")
    edges = np.arange(deciles) * len(mass) // deciles
    parts = {"share": energy, "effect": energy * mass, "mass": mass}
    sums = {name: np.add.reduceat(x[order], edges) for name, x in parts.items()}
    shares = {name: ("decile", s / s.sum() if s.sum() > 0 else np.full(deciles, np.nan)) for name, s in sums.items()}
    return xr.Dataset(shares, {"decile": np.arange(1, deciles + 1)})


def loss_path(original: Model, model: Model, facts: Sequence[Fact], *, points: int = 11) -> xr.Dataset:
    """Loss of each fact on the straight line between two models, `theta_t = theta_0 + t (theta_u - theta_0)`.

    The loss is the mean negative log-probability of the true answer's tokens. `barrier` of a split is the largest
    height of its mean loss above the straight line between the ends (linear mode connectivity, Frankle et al. 2020,
    arXiv 1912.05671), >= 0: near 0 means that both models lie in one basin. A memory that comes back within a small
    step from the unlearned model was never far away in the weights.

    What it does not prove: without a barrier, the unlearned model may still have lost the facts, and with one it may
    hold them. The line ends in the original, so the facts come back somewhere on it in any case.

    Args:
        original: t = 0.
        model: t = 1; both are left as they were.
        facts: any splits.
        points: how many t, from 0 to 1.

    Returns:
        `loss(fact, t)` in nats per answer token, `barrier(group)`, a group being a split; `distance` (L2 over all
        weights, tied ones once) is an attribute.

    Raises:
        InputError: the models are not of one architecture, there are no facts, points is below 2, or an answer cannot
            be tokenised.
    """
    if points < 2 or not facts:
        raise InputError(f"{points} points and {len(facts)} facts; give at least 2 points and a fact")
    before, after = whole(original), whole(model)
    placed = aligned(before, after)
    moved = (_read(after, o).double() - _read(before, o).double() for o, _ in _once(placed, before, after))
    asked = candidates(original.tokenizer, facts, most=0)
    steps = np.linspace(0, 1, points)
    loss = np.full((len(facts), points), np.nan)
    at = Model(after, original.tokenizer, model.role)
    for column, t in enumerate(steps):
        with holding(after, _between(before, after, placed, float(t))):
            loss[asked.fact, column] = -np.nanmean(score_tokens(at, asked.encoded)[0], -1)
    found = xr.Dataset(
        {"loss": (("fact", "t"), loss)},
        {**measurement.fact_coords(facts), "t": steps},
        {"distance": _length(moved), "units": "nats per answer token"},
    )
    return found.assign(barrier=barrier(found["loss"]))


def _length(tensors: Iterable[Tensor]) -> float:
    return float(np.sqrt(sum(x.square().sum().item() for x in tensors)))


def _between(before: Any, after: Any, placed: Iterable[Owner], t: float) -> dict[Owner, Tensor]:
    """Return the weights at t; what is tied in both models is made once."""
    made: dict[tuple[int, int], Tensor] = {}
    out = {}
    for owner in placed:
        one, two = parameter(before, owner).detach(), parameter(after, owner).detach()
        if (key := (id(parameter(before, owner)), id(parameter(after, owner)))) not in made:
            made[key] = torch.lerp(one.to(two), two, t)
        out[owner] = made[key]
    return out


def barrier(loss: xr.DataArray) -> xr.DataArray:
    """Height of each split's mean loss above the straight line between its ends, at its largest: (group), >= 0.

    >>> coords = {"fact": ["a"], "split": ("fact", ["forget"]), "t": [0.0, 0.5, 1.0]}
    >>> barrier(xr.DataArray([[1.0, 4.0, 3.0]], coords, ("fact", "t"))).values.tolist()
    [2.0]
    """
    mean = loss.groupby("split").mean("fact")
    line = mean.isel(t=0) + loss["t"] * (mean.isel(t=-1) - mean.isel(t=0))
    return (mean - line).max("t").rename(split="group")
