"""The eigenvectors of a map's K-FAC factors: spectra, and the few pairs of directions that carry most curvature."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from einops import einsum
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lethescope.errors import InputError
from lethescope.probes.curvature.kfac import Factors
from lethescope.probes.curvature.maps import LinearMap

CITATION = "Merullo et al. 2025 (arXiv 2510.24256); Martens & Grosse 2015 (arXiv 1503.05671)"


@dataclass(frozen=True)
class Basis:
    """Eigenvectors (columns) and eigenvalues of a map's factors, largest first: `G = U lam U^T`, `A = V mu V^T`."""

    name: str
    U: Float[Tensor, "p p"]
    lam: Float[Tensor, " p"]
    V: Float[Tensor, "q q"]
    mu: Float[Tensor, " q"]

    @property
    def axes(self) -> tuple[Float[Tensor, "p p"], Float[Tensor, "q q"]]:
        """U and V, as `corrected` takes them."""
        return self.U, self.V

    def rotated(self, weight: Float[Tensor, "p q"]) -> Float[Tensor, "p q"]:
        """Return the weight's components `C = U^T W V`, one for every pair of directions."""
        return self.U.mT @ weight.to(self.U) @ self.V

    def restored(self, components: Float[Tensor, "p q"]) -> Float[Tensor, "p q"]:
        """Return the weight `U C V^T` that has these components."""
        return self.U @ components.to(self.U) @ self.V.mT


def eigenbasis(factors: Factors) -> Basis:
    """Find the eigenvectors of a map's factors; eigenvalues that rounding has made negative are 0.

    Raises:
        InputError: a factor is not finite.

    Example:
        >>> basis = eigenbasis(Factors("map", torch.diag(torch.tensor([1.0, 4.0])), torch.eye(1), 10, 5.0))
        >>> basis.mu.tolist(), basis.V.abs().tolist()
        ([4.0, 1.0], [[0.0, 1.0], [1.0, 0.0]])
    """
    lam, U = principal(factors.G, f"G of {factors.name}")
    mu, V = principal(factors.A, f"A of {factors.name}")
    return Basis(factors.name, U, lam, V, mu)


def principal(matrix: Float[Tensor, "n n"], what: str = "matrix") -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Return eigenvalues (negative ones as 0) and eigenvectors (columns) of a symmetric matrix, largest first.

    Raises:
        InputError: it is not finite.
    """
    if not torch.isfinite(matrix).all():
        raise InputError(f"{what} is not finite; it has no eigenvectors")
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def spectra(factors: Mapping[str, Factors], maps: Sequence[LinearMap]) -> xr.Dataset:
    """Lay the eigenvalues of many maps side by side.

    What it does not prove: a steep spectrum says that the population uses few directions; it says nothing of any one
    fact, and eigenvalues of different models compare only where labels, texts and number of tokens are the same.

    Args:
        factors: what `lethescope.probes.curvature.kfac.factors` returns.
        maps: their maps, for their places in the model.

    Returns:
        `eigenvalue(map, side, rank)`, side `A` or `G`, largest first, NaN beyond a factor's width;
        `participation(map, side)` `(sum v)^2 / sum v^2`, from 1 to the width: how many directions share the curvature;
        `trace(map)` and `coupling(map)` of `Factors`, `count(map)`; coordinates `layer`, `part`, `kind`.

    Raises:
        InputError: a map has no factors.
    """
    chosen = [_factors_of(factors, m) for m in maps]
    values = [[principal(f.A, f.name)[0], principal(f.G, f.name)[0]] for f in chosen]
    table = np.full((len(maps), 2, max(len(v) for pair in values for v in pair)), np.nan)
    for m, pair in enumerate(values):
        for side, v in enumerate(pair):
            table[m, side, : len(v)] = v.cpu().numpy()
    squares = np.nansum(table**2, -1)
    share = np.nansum(table, -1) ** 2 / np.where(squares > 0, squares, np.nan)
    told = {name: ("map", [getattr(f, name) for f in chosen]) for name in ("trace", "coupling", "count")}
    data = {"eigenvalue": (("map", "side", "rank"), table), "participation": (("map", "side"), share), **told}
    coords = {**map_coords(maps), "side": ["A", "G"], "rank": np.arange(1, table.shape[-1] + 1)}
    return xr.Dataset(data, coords, {"units": "squared activation (A), squared nats (G)", "citation": CITATION})


def map_coords(maps: Sequence[LinearMap]) -> dict[str, object]:
    """Return the coordinates that every array over maps has: name, layer, part and kind."""
    told = {name: ("map", [getattr(m, name) for m in maps]) for name in ("layer", "part", "kind")}
    return {"map": [m.name for m in maps], **told}


def _factors_of(factors: Mapping[str, Factors], at: LinearMap) -> Factors:
    if at.name not in factors:
        raise InputError(f"there are no factors of map {at.name}; there are of {', '.join(factors)}")
    return factors[at.name]


def mass(lam: Float[Tensor, " p"], mu: Float[Tensor, " q"]) -> Float[Tensor, "p q"]:
    """Curvature that K-FAC gives to every pair of directions, `lam_i mu_j`."""
    return einsum(lam, mu, "p, q -> p q")


@dataclass(frozen=True)
class Kept:
    """Pairs of directions: of row i (eigenvector of G) the first `counts[i]` columns (eigenvectors of A).

    Eigenvalues fall along rows and columns, so the largest products are a staircase, and p numbers tell all of it.
    """

    counts: Int[NDArray[np.intp], " p"]
    width: int

    @property
    def fraction(self) -> float:
        """Share of all pairs, in [0, 1]."""
        return float(self.counts.sum()) / (len(self.counts) * self.width)

    def mask(self) -> Bool[NDArray[np.bool_], "p q"]:
        """Return which pairs are kept."""
        kept: NDArray[np.bool_] = np.arange(self.width) < self.counts[:, None]
        return kept


def kept_pairs(lam: ArrayLike, mu: ArrayLike, share: float) -> Kept:
    """Choose the fewest pairs whose mass `lam_i mu_j` reaches `share` of the whole (arXiv 2510.24256).

    The least of the kept masses is found by bisection, and every row counts its products above it: the products are
    never sorted, nor even held. 11008 x 4096 pairs take well under a second and less than 1 MB. Pairs that tie at the
    threshold are kept row by row, from the first, and no more of them than are needed. A share of mass is not one of
    pairs, and the same share keeps different fractions under different estimators: report `Kept.fraction`.

    Args:
        lam: (p) eigenvalues, at least 0, largest first.
        mu: (q) likewise.
        share: of the mass, in [0, 1].

    Returns:
        The kept pairs; none of mass 0.

    Raises:
        InputError: the share is out of range, or eigenvalues are negative, not finite or not sorted.

    Example:
        >>> kept_pairs([3, 1], [2, 1], 0.75).counts.tolist()  # masses 6 3 / 2 1, of 12: 6 and 3 reach 9
        [2, 0]
    """
    rows, columns = (_falling(x, name) for x, name in ((lam, "lam"), (mu, "mu")))
    if not 0 <= share <= 1:
        raise InputError(f"the share of mass to keep is {share}; it must be in [0, 1]")
    upto = np.concatenate([[0.0], np.cumsum(columns)])

    def at_least(least: float) -> Int[NDArray[np.intp], " p"]:
        return _count(rows, columns, lambda product: product >= least)

    target = share * float(rows @ np.full(len(rows), upto[-1]))
    least = _threshold(lambda t: float(rows @ upto[at_least(t)]) >= target, float(rows[0] * columns[0]))
    above = _count(rows, columns, lambda product: product > least)
    missing = target - float(rows @ upto[above])
    if least == 0 or missing <= 0:
        return Kept(above, len(columns))
    ties = at_least(least) - above
    more = np.minimum(int(np.ceil(missing / least)), ties.sum())
    taken = np.diff(np.minimum(np.cumsum(ties), more), prepend=0)
    return Kept(above + taken, len(columns))


def kept_mask(curvature: Float[Tensor, "p q"], share: float) -> Bool[Tensor, "p q"]:
    """Choose the fewest pairs that reach `share` of the whole where no product gives their mass: EK-FAC's `corrected`.

    Pairs that tie at the threshold are kept row by row, as by `kept_pairs`; none of mass 0 is.

    Raises:
        InputError: the share is out of range, or a mass is negative or not finite.

    Example:
        >>> kept_mask(torch.tensor([[6.0, 3.0], [2.0, 1.0]]), 0.75).tolist()
        [[True, True], [False, False]]
    """
    if not 0 <= share <= 1:
        raise InputError(f"the share of mass to keep is {share}; it must be in [0, 1]")
    if not torch.isfinite(curvature).all() or (curvature < 0).any():
        raise InputError("a mass is negative or not finite; give what `corrected` returns")
    values = curvature.flatten().cpu().numpy()
    falling = np.sort(values)[::-1]
    upto = np.cumsum(falling, dtype=np.float64)
    fewest = int(np.searchsorted(upto, share * upto[-1])) + 1 if share else 0
    least = falling[fewest - 1] if fewest else np.inf
    kept = values > least
    if least > 0:
        kept[np.flatnonzero(values == least)[: fewest - int(kept.sum())]] = True
    return torch.from_numpy(kept).view(curvature.shape).to(curvature.device)


def _falling(x: ArrayLike, name: str) -> Float[NDArray[np.float64], " n"]:
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or (values < 0).any():
        raise InputError(f"{name} must be eigenvalues, finite and at least 0; clamp what rounding made negative")
    if (np.diff(values) > 0).any():
        raise InputError(f"{name} must be sorted, largest first")
    return values


def _count(
    rows: Float[NDArray[np.float64], " p"], columns: Float[NDArray[np.float64], " q"], holds: Callable[..., NDArray]
) -> Int[NDArray[np.intp], " p"]:
    """Count in each row the products that are large enough; they come first, so halving finds where they end."""
    low, high = np.zeros(len(rows), dtype=np.intp), np.full(len(rows), len(columns), dtype=np.intp)
    while (low < high).any():
        middle = (low + high) // 2
        inside = holds(rows * columns[np.minimum(middle, len(columns) - 1)]) & (low < high)
        low, high = np.where(inside, middle + 1, low), np.where(inside | (low >= high), high, middle)
    return low


def _threshold(reaches: Callable[[float], bool], most: float) -> float:
    """Return the largest number up to `most` at which `reaches` holds; it holds at 0, and no longer from some point on.

    The halving is over the numbers themselves: positive floats are ordered as the integers of their bits.
    """
    low, high = 0, int(np.float64(most).view(np.int64)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reaches(float(np.int64(middle).view(np.float64))) else (low, middle)
    return float(np.int64(low).view(np.float64))
