"""Tests of the delta of weights: against loops and full decompositions, and edits whose numbers are known on paper."""

import doctest

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from lethescope.analyses import weights
from lethescope.analyses.compress import round_to_nearest
from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.models import Model, fingerprint, load
from lethescope.probes import say
from lethescope.subjects import shipped

KINDS = ("llama", "gpt2", "neox")


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed, n):
    return np.linalg.qr(normal(seed, n, n).numpy())[0]


def test_examples():
    assert doctest.testmod(weights).failed == 0


@pytest.fixture
def pair(make_model):
    return make_model(), make_model(role="unlearned")


def edited(model, path, change):
    weight = model.module.get_submodule(path).weight
    weight.data += change.to(weight)
    return weight


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_a_loop_over_named_parameters(make_model, kind):
    one, two = make_model(kind), make_model(kind, seed=1)
    found = weights.delta(one, two, bits=(4,), values=3)
    after = dict(two.module.named_parameters())
    named = dict(one.module.named_parameters())  # a tied one once
    assert set(found["weight"].values) == set(named)
    for name, w in named.items():
        d = (after[name].double() - w.double()).detach().numpy()
        row = found.sel(weight=name)
        assert row["n"] == d.size
        assert float(row["norm"]) == pytest.approx(np.sqrt((w.double().numpy() ** 2).sum()))
        assert float(row["change"]) == pytest.approx(np.sqrt((d**2).sum()), abs=1e-12)
        assert float(row["mean_change"]) == pytest.approx(np.abs(d).mean(), abs=1e-12)
        if d.ndim == 2:
            s = np.linalg.svd(d, compute_uv=False)
            np.testing.assert_allclose(row["spectrum"], s[:3], rtol=1e-6)
            assert float(row["stable_rank"]) == pytest.approx((s**2).sum() / s[0] ** 2)
        else:
            assert row["stable_rank"].isnull() and row["spectrum"].isnull().all()
    again = weights.delta(two, one, bits=(4,), values=3)  # what has no direction
    for name in ("change", "mean_change", "stable_rank"):
        np.testing.assert_allclose(again[name], found[name], rtol=1e-9)
    np.testing.assert_allclose(again["norm"], found["norm_after"], rtol=1e-9)


@pytest.mark.parametrize("rank", [1, 3])
def test_an_edit_of_known_rank_and_nothing_else(pair, rank):
    original, model = pair
    u, v = (np.linalg.qr(normal(i, n, rank).numpy())[0] for i, n in enumerate((64, 32)))
    path = "model.layers.2.mlp.up_proj"
    edited(model, path, torch.tensor(0.5 * u @ v.T))
    found = weights.delta(original, model)
    row = found.sel(weight=f"{path}.weight")
    assert float(row["stable_rank"]) == pytest.approx(rank, rel=1e-4)
    np.testing.assert_allclose(row["spectrum"][:rank], 0.5, rtol=1e-4)
    assert float(row["spectrum"][rank]) < 1e-4
    rest = found.drop_sel(weight=f"{path}.weight")
    assert (rest["change"] == 0).all() and (rest["relative_change"] == 0).all()
    assert rest["stable_rank"].isnull().all()
    table = weights.change_map(found)
    assert float(table.sel(row="block 2", kind="mlp.up_proj")) == pytest.approx(float(row["relative_change"]))
    block = found.where(found["row"] == "block 2", drop=True)
    want = 0.5 * rank**0.5 / float((block["norm"] ** 2).sum() ** 0.5)
    assert float(table.sel(row="block 2", kind="all")) == pytest.approx(want, rel=1e-4)
    assert (table.drop_sel(row="block 2").fillna(0) == 0).all()


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 7), columns=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_singular_values_equal_a_full_decomposition_and_do_not_turn(seed, rows, columns):
    matrix = normal(seed, rows, columns)
    want = np.linalg.svd(matrix.numpy(), compute_uv=False)
    np.testing.assert_allclose(weights.singular_values(matrix), want, atol=1e-6)
    turned = torch.tensor(rotation(seed, rows)) @ matrix
    np.testing.assert_allclose(weights.singular_values(turned), want, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("size", [0.3, 0.7])
def test_edits_below_half_a_bucket_and_above(make_model, kind, size):
    """Original weights are put on the grid; all but each group's largest then move by a part of a bucket."""
    original, model = make_model(kind), make_model(kind)
    path = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[kind]
    one, two = (m.module.get_submodule(path).weight.data for m in (original, model))
    if kind == "gpt2":
        one, two = one.T, two.T
    one.copy_(round_to_nearest(one, 4, 16))
    step = weights.buckets(one, 4, 16)
    inner = one.abs() < 6.5 * step
    two.copy_(one - torch.sign(one) * size * step * inner)
    found = weights.delta(original, model, bits=(4, 8), group=16).sel(weight=f"{path}.weight")
    moved = inner & (one != 0)
    share = float((~moved).float().mean())
    want = (1.0, 1.0) if size < 0.5 else (share, 0.0)
    assert float(found["below_bucket"].sel(bits=4)) == pytest.approx(want[0], abs=1e-6)
    assert float(found["same_level"].sel(bits=4)) == pytest.approx(want[1], abs=1e-6)
    assert float(found["same_level"].sel(bits=8)) < 1e-9  # 0.3 of a 4-bit bucket is 5 buckets of 8 bits
    outside = weights.delta(original, model, group=16)
    assert outside["below_bucket"].where(outside["layer"] < 0, drop=True).isnull().all()


def test_buckets_are_those_of_compress():
    weight = normal(0, 5, 24).float()
    for bits, group in ((3, 8), (4, 24), (8, 7)):
        step, rounded = weights.buckets(weight, bits, group), round_to_nearest(weight, bits, group)
        np.testing.assert_allclose((rounded / step).round() * step, rounded, atol=1e-6)
        assert ((rounded - weight).abs() <= step / 2 * (1 + 1e-5)).all()


def test_energy_is_in_the_decile_where_it_was_planted():
    q, p = 40, 7
    v, values = rotation(0, q), np.random.default_rng(1).permutation(np.geomspace(1, 1e-3, q))
    order = np.argsort(-values)
    for decile in (1, 4, 10):
        inside = v[:, order[4 * (decile - 1) : 4 * decile]]
        moved = normal(2, p, 4).numpy() @ inside.T
        found = weights.activation_shares(moved, v, values)
        want = np.eye(10)[decile - 1]
        np.testing.assert_allclose(found["share"], want, atol=1e-9)
        np.testing.assert_allclose(found["effect"], want, atol=1e-9)
        np.testing.assert_allclose(found["mass"].sum(), 1)
    outputs = rotation(3, p)  # another basis of the outputs changes nothing, nor do signs of eigenvectors
    again = weights.activation_shares(outputs @ moved, v * np.sign(normal(4, q).numpy()), values)
    xr.testing.assert_allclose(again, found)


def test_energy_by_decile_equals_loops_and_is_even_without_regard_to_the_basis():
    p, q = 6, 5
    u, v = rotation(0, p), rotation(1, q)
    lam, mu = np.geomspace(3, 0.1, p), np.geomspace(2, 0.2, q)
    d = normal(2, p, q).numpy()
    cells = sorted(
        ((lam[i] * mu[j], (u[:, i] @ d @ v[:, j]) ** 2) for i in range(p) for j in range(q)), key=lambda c: -c[0]
    )
    found = weights.curvature_shares(d, u, lam, v, mu, deciles=3)
    for k in range(3):
        part = cells[10 * k : 10 * (k + 1)]
        assert float(found["share"][k]) == pytest.approx(sum(e for _, e in part) / (d**2).sum())
        assert float(found["effect"][k]) == pytest.approx(sum(m * e for m, e in part) / sum(m * e for m, e in cells))
        assert float(found["mass"][k]) == pytest.approx(sum(m for m, _ in part) / (lam.sum() * mu.sum()))
    many = [weights.curvature_shares(normal(s, p, q).numpy(), u, lam, v, mu, deciles=3)["share"] for s in range(300)]
    np.testing.assert_allclose(np.mean(many, 0), 1 / 3, atol=0.02)


def test_bases_that_do_not_fit_are_refused():
    d, v = np.ones((3, 4)), np.eye(4)
    with pytest.raises(InputError, match=r"vectors are \(3, 3\).*needs \(4, 4\)"):
        weights.activation_shares(d, np.eye(3), np.ones(3), deciles=2)
    with pytest.raises(InputError, match="not orthonormal"):
        weights.activation_shares(d, 2 * v, np.ones(4), deciles=2)
    with pytest.raises(InputError, match="10 deciles of 4 directions"):
        weights.activation_shares(d, v, np.ones(4))
    with pytest.raises(InputError, match="output_vectors"):
        weights.curvature_shares(d, v, np.ones(4), v, np.ones(4), deciles=2)


@pytest.fixture(scope="module")
def asked(some_facts):
    return of_split(some_facts, "forget")[:4] + of_split(some_facts, "retain")[:4]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_path_ends_in_both_models_and_its_middle_is_the_mean(make_model, asked, kind):
    one, two = make_model(kind), make_model(kind, seed=1)
    before = fingerprint(one.module), fingerprint(two.module)
    found = weights.loss_path(one, two, asked, points=3)
    assert (fingerprint(one.module), fingerprint(two.module)) == before
    middle = make_model(kind)
    with torch.no_grad():
        for p, other in zip(middle.module.parameters(), two.module.parameters(), strict=True):
            p.copy_((p + other) / 2)
    for t, model in enumerate((one, middle, two)):
        said = say.measure(model, asked)["log_probability"].isel(prompt=0, candidate=0)
        np.testing.assert_allclose(found["loss"][:, t], -said, atol=1e-4)
    squares = [
        (a - b).double().square().sum() for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True)
    ]
    assert found.attrs["distance"] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)
    split = np.array(["forget"] * 4 + ["retain"] * 4)
    for name in ("forget", "retain"):
        mean = found["loss"].values[split == name].mean(0)
        want = max(0, mean[1] - (mean[0] + mean[2]) / 2)
        assert float(found["barrier"].sel(group=name)) == pytest.approx(want, abs=1e-9)
    shuffled = weights.loss_path(one, two, asked[::-1], points=3)
    xr.testing.assert_allclose(shuffled["loss"].sel(fact=found["fact"]), found["loss"], atol=1e-4)


def test_options_out_of_range(pair, asked, make_model):
    with pytest.raises(InputError, match="1 points"):
        weights.loss_path(*pair, asked, points=1)
    with pytest.raises(InputError, match="0 facts"):
        weights.loss_path(*pair, ())
    with pytest.raises(InputError, match="group 0"):
        weights.delta(*pair, group=0)
    with pytest.raises(InputError, match="one architecture"):
        weights.delta(pair[0], make_model("gpt2"))


def test_the_shipped_unlearned_model_moved_in_its_upper_half_only():
    original, unlearned = (load(shipped(name)) for name in ("original", "unlearned"))
    table = weights.change_map(weights.delta(original, unlearned, bits=(4,), values=1))
    moved = table.sel(kind="all")
    assert (moved.sel(row=["embedding", "block 0", "block 1", "block 2", "final norm"]) == 0).all()
    assert (moved.sel(row=["block 3", "block 4", "block 5"]) > 0.1).all()


def test_an_adapter_counts_with_its_base(make_model):
    from lethescope.subjects.methods.training import with_adapters

    original, model = make_model(), make_model()
    adapted = with_adapters(model.module, 0, r=2).eval()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name and "layers.1." in name:
                p.fill_(0.1)
    found = weights.delta(original, Model(adapted, model.tokenizer, "unlearned"))
    moved = found.where(found["change"] > 1e-6, drop=True)
    assert set(moved["row"].values) == {"block 1"} and (moved["stable_rank"] < 2.001).all()
