"""Tests of private share and of energy per band: a hand-made map, slow twins, and a model with memories of its own."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import xarray as xr

from lethescope import measurement
from lethescope.auc import auc
from lethescope.errors import InputError
from lethescope.hooks import Stop
from lethescope.probes.curvature import energy, kfac, maps, private_share
from lethescope.probes.curvature.basis import eigenbasis
from lethescope.probes.curvature.energy import axes, bands, random_axes
from lethescope.probes.curvature.maps import linear_maps
from lethescope.tokens import encode

KINDS = ("llama", "gpt2", "neox")


@torch.no_grad()
def inputs(model, at, ids):
    """The inputs of one map in one plain pass, (pos q)."""
    seen = []
    hook = at.modules[0].register_forward_hook(lambda _m, args, _y: seen.append(args[0][0]))
    model.module(input_ids=torch.tensor([list(ids)]))
    hook.remove()
    return seen[0].double()


def bases(model, chosen, seed=0):
    return random_axes({m.name: torch.eye(m.shape[1], dtype=torch.float64) for m in chosen}, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_loops_over_tokens_and_directions(make_model, some_facts, kind):
    model, facts = make_model(kind), [*some_facts[:3], some_facts[40]]
    chosen = linear_maps(model, parts=["attention", "mlp"], layers=[0, 2])
    basis = bases(model, chosen)
    found = private_share.measure(model, facts, basis, maps=chosen, flat=0.25, rows=3)
    share = bands(model, facts, basis, maps=chosen, edges=(0.25, 0.75), rows=3)
    assert found["split"].values.tolist() == [f.split for f in facts] and found.sizes["map"] == len(chosen)
    for i, fact in enumerate(facts):
        e = encode(model.tokenizer, fact.prompt, fact.answer)
        for k, m in enumerate(chosen):
            x, v, w = inputs(model, m, e.ids)[e.start - 1 : -1], basis[m.name], m.weight.double()
            width = len(v)
            terms = [[float((w @ v[:, j]) @ (w @ v[:, j]) * (v[:, j] @ t) ** 2) for j in range(width)] for t in x]
            cut = width - round(width / 4)
            want = sum(sum(t[cut:]) for t in terms) / sum(map(sum, terms))
            assert found["score"][i, k].item() == pytest.approx(want, rel=1e-4)
            along = (x @ v).square().sum(0)
            cuts = [0, width // 4, 3 * width // 4, width]
            in_bands = [float(along[a:b].sum() / along.sum()) for a, b in pairwise(cuts)]
            np.testing.assert_allclose(share["share"][i, k], in_bands, rtol=1e-4)
            assert share["energy"][i, k].item() == pytest.approx(float(x.square().sum(-1).mean()), rel=1e-4)


def test_a_map_known_on_paper(make_model):
    """Where W is the identity on an axis and 0 on the others, all its output is from there: share 1 or 0."""
    model = make_model()
    (gate, *_) = linear_maps(model, layers=[1])
    q = gate.shape[1]
    eye = {gate.name: torch.eye(q, dtype=torch.float64)}
    for axis, want in ((0, 0.0), (q - 1, 1.0)):
        gate.modules[0].weight.data.zero_()[0, axis] = 1
        score = private_share.measure(model, [[1, 5, 6, 7]], eye, maps=[gate])["score"]
        assert score.values.tolist() == [[want]]
    gate.modules[0].weight.data.zero_()
    assert np.isnan(private_share.measure(model, [[1, 5, 6]], eye, maps=[gate])["score"]).all()


def test_axes_are_the_eigenvectors_of_the_plain_factor(make_model, memorised):
    model, texts = memorised.model, memorised.clean[:64].tolist()
    chosen = linear_maps(model, layers=[1])
    found = axes(model, texts, maps=chosen)
    assert found[chosen[0].name] is found[chosen[1].name]  # gate and up read the same
    for name, f in kfac.factors(model, texts, maps=chosen).items():
        basis = eigenbasis(f)
        gaps = -basis.mu.diff() / basis.mu[0]
        sure = [j for j in range(1, len(gaps)) if min(gaps[j - 1 : j + 1]) > 1e-4]
        assert len(sure) > 5
        same = (found[name] * basis.V).sum(0).abs()[sure]
        torch.testing.assert_close(same, torch.ones_like(same), atol=1e-4, rtol=0)


def test_neither_batches_nor_signs_of_axes_nor_the_size_of_the_weights_matter(make_model, some_facts):
    model, facts = make_model(), some_facts[:9]
    chosen = linear_maps(model)
    basis = bases(model, chosen)
    one = private_share.measure(model, facts, basis, rows=1)["score"]
    xr.testing.assert_allclose(private_share.measure(model, facts, basis, rows=4)["score"], one, atol=1e-5)
    turned = {name: v * torch.tensor([-1.0, 1]).repeat(len(v) // 2) for name, v in basis.items()}
    xr.testing.assert_allclose(private_share.measure(model, facts, turned)["score"], one, atol=1e-5)
    last = chosen[-1].modules[0].weight
    last.data *= 8
    xr.testing.assert_allclose(private_share.measure(model, facts, basis)["score"], one, atol=1e-5)


def test_the_pass_ends_with_the_last_map_and_leaves_no_hook(make_model, monkeypatch):
    model, run = make_model(), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_a, i=i: run.append(i))
    chosen = linear_maps(model, layers=[1])
    private_share.measure(model, [[1, 5, 6]], bases(model, chosen))
    assert run == [0]  # block 1 was left within
    assert not any(m._forward_hooks for m in model.module.modules() if m not in model.blocks)
    assert issubclass(maps.Stop, Stop)


def aucs(scores, one, other):
    return {m: auc(scores[one][m], scores[other][m]) for m in scores[one]}


def scores(made, basis, **options):
    """Mean over the maps of a layer's MLP -> by group, layer -> values."""
    out = {}
    for group in ("planted", "ordinary", "fresh"):
        ds = private_share.measure(made.model, getattr(made, group).tolist(), basis, **options)
        out[group] = {layer: part.values.mean(1) for layer, part in ds["score"].groupby("layer")}
    return out


def test_the_model_knows_by_heart_what_was_planted(memorised):
    right = {}
    for group in ("planted", "ordinary", "fresh"):
        ids = torch.from_numpy(getattr(memorised, group))
        with torch.no_grad():
            said = memorised.model.module(input_ids=ids).logits.argmax(-1)
        right[group] = float((said[:, 11:-1] == ids[:, 12:]).float().mean())
    assert right["planted"] > 0.95 and 0.25 < right["ordinary"] < 0.6 and right["fresh"] < 0.05


def test_private_share_tells_memories_from_the_language_and_from_what_was_never_seen(memorised):
    """The upper two blocks do; block 0, which sees single words only, does not tell planted from fresh random words."""
    basis = axes(memorised.model, memorised.clean.tolist())
    found = scores(memorised, basis)
    known, never = aucs(found, "planted", "ordinary"), aucs(found, "planted", "fresh")
    assert min(known[1], known[2], never[1], never[2]) >= 0.9
    nulls = [scores(memorised, random_axes(basis, seed)) for seed in range(8)]
    for layer in (1, 2):
        chance = np.mean([aucs(null, "planted", "ordinary")[layer] for null in nulls])
        assert 0.3 < chance < 0.7


def test_memories_lean_to_the_bottom_band(memorised):
    basis = axes(memorised.model, memorised.clean.tolist())
    share = {
        group: bands(memorised.model, getattr(memorised, group).tolist(), basis)["share"].mean("fact")
        for group in ("planted", "ordinary", "fresh")
    }
    for ds in share.values():
        np.testing.assert_allclose(ds.sum("band"), 1, atol=1e-6)
        assert ds["band"].values.tolist() == ["0% to 10%", "10% to 25%", "25% to 50%", "50% to 100%"]
    upper = share["planted"]["layer"].values > 0
    assert (share["planted"][upper, -1] > share["fresh"][upper, -1]).all()
    assert (share["fresh"][upper, -1] > share["ordinary"][upper, -1]).all()
    assert (share["planted"][upper, 0] < share["ordinary"][upper, 0]).all()


def test_it_is_a_measurement_that_can_be_kept(make_model, some_facts, tmp_path):
    model = make_model()
    basis = bases(model, linear_maps(model))
    for ds in (private_share.measure(model, some_facts[:3], basis), bands(model, ["Ada Rook was born"], basis)):
        measurement.save(ds, tmp_path / "share.nc")
        xr.testing.assert_equal(measurement.open_(tmp_path / "share.nc"), ds)
    other = bands(model, ["Ada Rook was born"], bases(model, linear_maps(model), seed=1))
    assert other.attrs["parameters"] != ds.attrs["parameters"] and other.attrs["facts"] == ds.attrs["facts"]


def test_bad_input_is_told(make_model):
    model = make_model()
    chosen, texts = linear_maps(model), [[1, 5, 6]]
    basis = bases(model, chosen)
    name = chosen[0].name
    cases = {
        "some must be flat and some not": lambda: private_share.measure(model, texts, basis, flat=1.0),
        f"there are no axes for map {name}": lambda: private_share.measure(model, texts, {}, maps=chosen),
        "no MLP maps of the original model": lambda: private_share.measure(model, texts, {"x": torch.eye(2)}),
        "has 32 inputs and its axes 2 rows": lambda: private_share.measure(model, texts, {name: torch.eye(2)}),
        "must rise within": lambda: bands(model, texts, basis, edges=(0.5, 0.1)),
        "2 tokens cannot tell the 64 directions of model.layers.0.mlp.down_proj": lambda: axes(model, texts),
        "text 0 has 1 tokens": lambda: energy.bands(model, [[1]], basis),
    }
    for told, call in cases.items():
        with pytest.raises(InputError) as error:
            call()
        assert told in str(error.value) and "\n" not in str(error.value)
