"""Tests of eigenbases and of the pairs of directions that are kept: against sorting every product."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lethescope.errors import InputError
from lethescope.probes.curvature.basis import (
    eigenbasis,
    kept_mask,
    kept_pairs,
    mass,
    principal,
    spectra,
)
from lethescope.probes.curvature.kfac import Factors
from lethescope.probes.curvature.maps import linear_maps


def by_sorting(products, share):
    """The textbook way: sort all, add up, stop where the share is reached; of equals the first rows come first."""
    order = np.argsort(-products, axis=None, kind="stable")
    kept, total, target = np.zeros(products.size, dtype=bool), 0.0, share * products.sum()
    for at in order:
        if total >= target or products.flat[at] == 0:
            break
        kept[at], total = True, total + products.flat[at]
    return kept.reshape(products.shape)


eigenvalues = st.lists(st.integers(0, 12), min_size=1, max_size=9).map(lambda x: sorted(x, reverse=True))


@settings(max_examples=60, deadline=None)
@given(eigenvalues, eigenvalues, st.integers(0, 16))
def test_kept_pairs_are_those_of_sorting_with_ties_and_zeros(lam, mu, sixteenths):
    """Integers and sixteenths add up without rounding, so that the two ways must agree to the last pair."""
    products, share = np.outer(lam, mu).astype(float), sixteenths / 16
    kept = kept_pairs(lam, mu, share)
    np.testing.assert_array_equal(kept.mask(), by_sorting(products, share))
    np.testing.assert_array_equal(kept_mask(torch.tensor(products), share), by_sorting(products, share))
    assert kept.fraction == kept.mask().mean()


@pytest.mark.parametrize("share", [0.1, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.1, 1, 4])
def test_kept_pairs_are_those_of_sorting_on_real_numbers(share, spread):
    rng = np.random.default_rng(0)
    lam, mu = (np.sort(rng.lognormal(0, spread, n))[::-1] for n in (37, 61))
    products = np.outer(lam, mu)
    found = kept_pairs(lam, mu, share).mask()
    np.testing.assert_array_equal(found, by_sorting(products, share))
    np.testing.assert_array_equal(kept_mask(torch.tensor(products), share), found)
    fewer = products[found].sum() - products[found].min()
    assert products[found].sum() >= share * products.sum() > fewer


def test_kept_pairs_grow_with_the_share_and_do_not_depend_on_the_scale():
    rng = np.random.default_rng(1)
    lam, mu = (np.sort(rng.gamma(1, 1, n))[::-1] for n in (12, 30))
    masks = [kept_pairs(lam, mu, share).mask() for share in np.linspace(0, 1, 9)]
    assert all((less <= more).all() for less, more in pairwise(masks))
    assert masks[0].sum() == 0 and masks[-1].all()
    np.testing.assert_array_equal(kept_pairs(lam * 2.0**-200, mu * 2.0**90, 0.5).mask(), masks[4])
    np.testing.assert_array_equal(kept_pairs(mu, lam, 0.5).mask().T, masks[4])


def test_kept_pairs_of_a_large_matrix_need_no_sorting():
    rng = np.random.default_rng(0)
    lam, mu = (np.sort(rng.lognormal(0, 2, n))[::-1] for n in (1100, 409))
    kept = kept_pairs(lam, mu, 0.6)
    products = np.sort(np.outer(lam, mu), axis=None)[::-1]
    assert kept.counts.sum() == 1 + np.searchsorted(np.cumsum(products), 0.6 * lam.sum() * mu.sum())


def test_nothing_is_kept_where_there_is_no_curvature():
    assert kept_pairs([0, 0], [3, 1], 1).counts.tolist() == [0, 0]
    assert not kept_mask(torch.zeros(2, 2), 1.0).any()


def factors_of(A, G, name="map"):
    return Factors(name, A, G, 10, float(A.trace() * G.trace()) * 2)


def spd(n, seed):
    x = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x @ x.mT


def test_an_eigenbasis_gives_back_its_factors_and_a_rotated_weight_comes_back():
    A, G = spd(5, 0), spd(3, 1)
    basis = eigenbasis(factors_of(A, G))
    torch.testing.assert_close(basis.V @ basis.mu.diag() @ basis.V.mT, A)
    torch.testing.assert_close(basis.U @ basis.lam.diag() @ basis.U.mT, G)
    assert (basis.mu.diff() <= 0).all() and (basis.lam.diff() <= 0).all()
    weight = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(basis.restored(basis.rotated(weight)), weight)
    torch.testing.assert_close(mass(basis.lam, basis.mu).sum(), A.trace() * G.trace())
    both = torch.kron(G, A)  # the curvature of W laid out row by row: its eigenvalues are the masses
    torch.testing.assert_close(mass(basis.lam, basis.mu).flatten().sort()[0], torch.linalg.eigvalsh(both))


def test_a_matrix_of_low_rank_has_no_negative_eigenvalue():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert torch.linalg.eigvalsh(x @ x.mT).min() < 0  # rounding
    values, _ = principal(x @ x.mT)
    assert values.min() == 0 and (values[:3] > 1).all()


def test_spectra_lie_side_by_side(make_model):
    model = make_model()
    maps = linear_maps(model, layers=[0, 2])
    found = {m.name: factors_of(torch.eye(m.shape[1]), spd(m.shape[0], i), m.name) for i, m in enumerate(maps)}
    ds = spectra(found, maps)
    assert ds["eigenvalue"].shape == (6, 2, 64) and ds["layer"].values.tolist() == [0, 0, 0, 2, 2, 2]
    np.testing.assert_allclose(ds["eigenvalue"].sel(side="A").sum("rank"), [m.shape[1] for m in maps])
    np.testing.assert_allclose(ds["participation"].sel(side="A"), [m.shape[1] for m in maps], rtol=1e-6)
    np.testing.assert_allclose(ds["coupling"], 2, rtol=1e-6)
    one = ds["eigenvalue"][0, 1]
    np.testing.assert_allclose(one.dropna("rank"), np.linalg.eigvalsh(found[maps[0].name].G)[::-1], rtol=1e-6)
    assert ds["participation"][0, 1].item() == pytest.approx(float(one.sum()) ** 2 / float((one**2).sum()))


def test_bad_input_is_told(make_model):
    cases = {
        r"share of mass to keep is 1\.5": lambda: kept_pairs([1], [1], 1.5),
        "share of mass to keep is -1": lambda: kept_mask(torch.eye(2), -1),
        "lam must be eigenvalues": lambda: kept_pairs([1, -1], [1], 0.5),
        "mu must be eigenvalues": lambda: kept_pairs([1], [np.inf], 0.5),
        "mu must be sorted": lambda: kept_pairs([1], [1, 2], 0.5),
        "a mass is negative": lambda: kept_mask(-torch.eye(2), 0.5),
        "G of map is not finite": lambda: eigenbasis(factors_of(torch.eye(2), torch.eye(2) * torch.nan)),
        "no factors of map model.layers.0.mlp.gate_proj": lambda: spectra({}, linear_maps(make_model())),
    }
    for told, call in cases.items():
        with pytest.raises(InputError, match=told):
            call()
