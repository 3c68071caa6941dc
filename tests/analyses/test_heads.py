"""Tests of comparing heads and of taking them out: published files, slow twins, bad files, and a trained head."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from lethescope.analyses.heads import (
    ablation,
    compare,
    compare_files,
    control_heads,
    correlation,
    in_context,
    jaccard_top,
    mean_scores,
    read_scores,
    share_at_least,
    top_heads,
)
from lethescope.attention import ablating, mean_outputs
from lethescope.errors import InputError
from lethescope.facts import Fact, of_split
from lethescope.probes import retrieval_heads
from lethescope.probes.needles import key_value_needles
from lethescope.tokens import encode

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "head_scores"


def scores(array) -> xr.Dataset:
    """A Dataset of scores (instance, layer, head)."""
    return xr.Dataset({"score": (("instance", "layer", "head"), np.asarray(array, dtype=float))})


def drawn(seed=0, shape=(5, 4, 6)) -> xr.Dataset:
    """Sparse scores, as real ones are."""
    rng = np.random.default_rng(seed)
    return scores(rng.random(shape) * (rng.random(shape[1:]) < 0.4))


def table(rows) -> xr.DataArray:
    return xr.DataArray(np.asarray(rows, dtype=float), dims=("layer", "head"))


def ranks(values):
    """Ranks from 1, the mean rank for ties."""
    return [1 + sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def slow_correlation(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    both = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return both / (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5


def test_comparison_equals_plain_python():
    a, b = drawn(0), drawn(1)
    x, y = (list(np.mean(ds["score"].values, 0).ravel()) for ds in (a, b))
    found = compare(a, b, k=5)
    assert found["pearson"] == pytest.approx(slow_correlation(x, y))
    assert found["spearman"] == pytest.approx(slow_correlation(ranks(x), ranks(y)))
    best = [set(sorted(range(24), key=lambda i: -v[i])[:5]) for v in (x, y)]
    assert found["jaccard_top5"] == pytest.approx(len(best[0] & best[1]) / len(best[0] | best[1]))
    for cut in (0.1, 0.5):
        assert found[f"count_ge_{cut}"] == [sum(v >= cut for v in w) for w in (x, y)]
        assert found[f"share_ge_{cut}"] == pytest.approx([sum(v >= cut for v in w) / 24 for w in (x, y)])
    assert found["instances"] == [5, 5] and found["kept_share"] == [1, 1]
    json.dumps(found, allow_nan=False)


def test_a_model_equals_itself_and_order_does_not_matter():
    a, b = drawn(0), drawn(1)
    same = compare(a, a, k=5)
    assert same["pearson"] == pytest.approx(1) and same["spearman"] == pytest.approx(1) and same["jaccard_top5"] == 1
    there, back = compare(a, b, k=5), compare(b, a.isel(instance=[4, 2, 0, 1, 3]), k=5)
    for name in ("pearson", "spearman", "jaccard_top5"):
        assert there[name] == pytest.approx(back[name])
    assert there["count_ge_0.1"] == back["count_ge_0.1"][::-1]
    scaled = correlation(mean_scores(a), 3 * mean_scores(b) + 1)
    assert scaled == pytest.approx(correlation(mean_scores(a), mean_scores(b)))


def test_shuffled_heads_do_not_correlate():
    a = drawn(0, (5, 20, 20))
    rng, found = np.random.default_rng(0), []
    for _ in range(50):
        mixed = rng.permutation(a["score"].values.reshape(5, -1).T).T.reshape(5, 20, 20)
        found.append(correlation(mean_scores(a), mean_scores(scores(mixed)))["pearson"])
    assert abs(np.mean(found)) < 3 / np.sqrt(50 * 400) and np.max(np.abs(found)) < 0.25


def test_dropped_instances_and_layers_without_attention_do_not_count():
    a = drawn(0)
    dropped = a.copy(deep=True)
    dropped["score"][1] = np.nan
    np.testing.assert_allclose(mean_scores(dropped), a["score"].values[[0, 2, 3, 4]].mean(0))
    assert compare(a, dropped)["kept_share"] == [1, 0.8]
    holed = a.copy(deep=True)
    holed["score"][:, 2] = np.nan
    x, y = (np.delete(ds["score"].values.mean(0), 2, 0).ravel() for ds in (a, drawn(1)))
    assert correlation(mean_scores(holed), mean_scores(drawn(1)))["pearson"] == pytest.approx(slow_correlation(x, y))
    assert share_at_least(mean_scores(holed)) == pytest.approx((x >= 0.1).mean())
    assert all(layer != 2 for layer, _ in top_heads(mean_scores(holed), 24))


def test_the_best_heads_are_never_those_without_a_score():
    few = table([[0, 0.2, 0], [0.5, 0, 0.2]])
    assert top_heads(few, 2) == [(1, 0), (0, 1)]  # a tie goes to the lower place
    assert top_heads(few, 6) == [(1, 0), (0, 1), (1, 2)]
    assert jaccard_top(few, table([[0, 0, 0], [0.5, 0, 0]]), 6) == pytest.approx(1 / 3)
    nothing = table(np.zeros((2, 3)))
    assert np.isnan(jaccard_top(nothing, nothing)) and np.isnan(correlation(nothing, few)["pearson"])


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published score files are not here")
def test_published_numbers_are_met():
    """Counts, shares, best heads and correlation of Llama-2-7B-80K and Yi-6B-200K, as published scores give them."""
    llama, yi = PUBLISHED / "llama-2-7b-80k.json", PUBLISHED / "Yi-6B-200K.json"
    found = compare_files(llama, yi)
    assert f"{found['pearson']:.3f}" == "-0.011" and found["jaccard_top30"] < 0.05
    assert [f"{100 * share:.2f}" for share in found["share_ge_0.1"]] == ["3.22", "5.18"]
    assert found["count_ge_0.1"] == [33, 53] and found["count_ge_0.5"] == [6, 7]
    assert found["instances"] == [586, 567]
    mean = mean_scores(read_scores(llama))
    best = [(16, 19), (11, 15), (8, 26), (6, 9), (7, 12), (17, 22), (11, 2), (6, 16), (19, 15), (21, 30)]
    assert top_heads(mean, 10) == best
    published = [0.943, 0.920, 0.800, 0.618, 0.614, 0.557, 0.459, 0.437, 0.420, 0.400]
    np.testing.assert_allclose([float(mean[h]) for h in best], published, atol=5e-4)
    assert f"{100 * float((mean == 0).mean()):.1f}" == "70.2"


GOOD = {"0-0": [0, 0.5], "0-1": [1.5, 0], "1-0": [0, 0], "1-1": [0.25, 1]}


def test_a_file_is_read_in_any_order(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(dict(reversed(GOOD.items()))))
    ds = read_scores(path)
    assert ds["score"].dims == ("instance", "layer", "head")
    for key, values in GOOD.items():
        layer, head = map(int, key.split("-"))
        np.testing.assert_array_equal(ds["score"].sel(layer=layer, head=head), values)
    assert compare_files(path, path, k=2)["jaccard_top2"] == 1


BAD = {
    'key "1-1" has 3 scores, "0-0" 2': {**GOOD, "1-1": [1, 2, 3]},
    'key "1-0" is missing; there must be all of 2 layers x 2 heads': {k: v for k, v in GOOD.items() if k != "1-0"},
    'key "900000000-0" ': {**GOOD, "900000000-0": [0]},
    'key "x" is not "layer-head"': {**GOOD, "x": [0, 0]},
    'key "1-01" is not "layer-head"': {**GOOD, "1-01": [0, 0]},
    'key "-1-0" is not "layer-head"': {**GOOD, "-1-0": [0, 0]},
    'key "1-1" must have a list of scores': {**GOOD, "1-1": 0.5},
    'key "0-0" must have a list of scores': {**GOOD, "0-0": []},
    "key \"1-1\" has 'a' for a score": {**GOOD, "1-1": ["a", 0]},
    'key "1-1" has True for a score': {**GOOD, "1-1": [True, 0]},
    'key "1-1" has -1 for a score': {**GOOD, "1-1": [0, -1]},
    'key "1-1" has nan for a score': {**GOOD, "1-1": [0, float("nan")]},
    'key "1-1" has inf for a score': {**GOOD, "1-1": [0, float("inf")]},
    'key "1-1" has None for a score': {**GOOD, "1-1": [0, None]},
    "not a score file": [1, 2],
    "not a score file; ": {},
    "line 1: not valid JSON": "{",
}


@pytest.mark.parametrize(("told", "content"), BAD.items())
def test_a_bad_file_is_told_by_file_and_key(tmp_path, told, content):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(GOOD))
    bad.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as error:
        compare_files(good, bad)
    assert str(bad) in str(error.value) and told in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_and_models_of_other_shapes_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        compare_files(tmp_path / "none.json", tmp_path / "none.json")
    with pytest.raises(InputError, match="have 4 x 6 and 3 x 6 layers x heads"):
        compare(drawn(), drawn(shape=(5, 3, 6)))
    with pytest.raises(InputError, match="these are no retrieval scores"):
        compare(drawn(), xr.Dataset())
    with pytest.raises(InputError, match="no head has a score in both"):
        compare(drawn(), scores(np.full((2, 4, 6), np.nan)))
    with pytest.raises(InputError, match="the top 0 heads are none"):
        compare(drawn(), drawn(), k=0)


def test_controls_are_matched_by_layer_and_are_no_retrieval_heads():
    mean = table([[0.9, 0.05, 0, 0.3, 0.01, 0], [0, 0, 0.09, 0.1, 0.8, 0.7], [0, 0, 0, 0, 0, 0]])
    top = top_heads(mean, 3)
    assert top == [(0, 0), (1, 4), (1, 5)]
    controls = control_heads(mean, top, draws=40, seed=1)
    for heads in controls:
        assert Counter(layer for layer, _ in heads) == {0: 1, 1: 2} and len(set(heads)) == 3
        assert all(float(mean[head]) < 0.1 for head in heads)
    assert {head for heads in controls for head in heads} == {(0, 1), (0, 2), (0, 4), (0, 5), (1, 0), (1, 1), (1, 2)}
    assert controls == control_heads(mean, top, draws=40, seed=1) != control_heads(mean, top, draws=40, seed=2)


def test_what_a_layer_cannot_give_comes_from_the_others():
    mean = table([[0.9, 0.8, 0.7, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for heads in control_heads(mean, top_heads(mean, 3), draws=20):
        assert (0, 3) in heads and Counter(layer for layer, _ in heads) == {0: 1, 1: 2} and len(set(heads)) == 3
    with pytest.raises(InputError, match=r"only 1 heads score below 0\.1 for 3 top heads"):
        control_heads(mean.isel(layer=[0]), top_heads(mean, 3))


@torch.no_grad()
def slow_arm(model, fact, heads, kind, phase, means):
    """One answer in one plain pass: mean log-probability and whether all first choices are right."""
    e = encode(model.tokenizer, fact.prompt, fact.answer)
    places = range(e.start - 1, len(e.ids)) if phase == "decode" else None
    with ablating(model, heads, kind, positions=places, means=means):
        logits = model.module(input_ids=torch.tensor([e.ids])).logits[0]
    log_p = [logits[j - 1].log_softmax(-1)[e.ids[j]].item() for j in range(e.start, len(e.ids))]
    return np.mean(log_p), all(int(logits[j - 1].argmax()) == e.ids[j] for j in range(e.start, len(e.ids)))


@pytest.mark.parametrize("kind", ["uniform", "zero", "mean"])
@pytest.mark.parametrize("phase", ["decode", "all"])
def test_ablation_equals_one_answer_at_a_time(make_model, some_facts, kind, phase):
    model, facts = make_model("llama"), of_split(some_facts, "forget")[:7]
    own = drawn(3, (4, 4, 4))
    ds = ablation(model, facts, own, k=3, kind=kind, phase=phase, draws=3, seed=5, rows=3)
    means = mean_outputs(model, [encode(model.tokenizer, f.prompt, f.answer).ids for f in facts])
    assert ds["arm"].values.tolist() == ["none", "top", "control 0", "control 1", "control 2"]
    for arm in ds["arm"].values:
        heads = [tuple(map(int, h.split("-"))) for h in str(ds["heads"].sel(arm=arm).item()).split()]
        assert len(heads) == (0 if arm == "none" else 3)
        for fact in facts:
            wanted = slow_arm(model, fact, heads, kind, phase, means)
            one = ds.sel(arm=arm, instance=fact.id)
            assert float(one["log_prob"]) == pytest.approx(wanted[0], abs=1e-4)
            assert bool(one["exact_match"]) == wanted[1]
    assert ds["log_prob"].sel(arm="top").values != pytest.approx(ds["log_prob"].sel(arm="none").values, abs=1e-3)
    lost = ds["log_prob"].sel(arm="none") - ds["log_prob"]
    controls = [f"control {i}" for i in range(3)]
    effect = float(lost.sel(arm="top").mean() - np.mean([lost.sel(arm=c).mean() for c in controls]))
    found = ds["effect"].sel(quantity="log_prob")
    assert float(found.sel(bound="estimate")) == pytest.approx(effect)
    assert float(found.sel(bound="low")) < effect < float(found.sel(bound="high"))
    below = np.mean([float(lost.sel(arm=c).mean()) < float(lost.sel(arm="top").mean()) for c in controls])
    assert float(ds["draws_below"].sel(quantity="log_prob")) == pytest.approx(below)


def test_a_seed_decides_the_draws_and_the_interval(make_model, some_facts):
    model, facts = make_model("gpt2"), of_split(some_facts, "forget")[:5]
    runs = [ablation(model, facts, drawn(3, (4, 3, 4)), k=2, draws=10, seed=s) for s in (0, 0, 1)]
    xr.testing.assert_identical(runs[0], runs[1])
    assert not runs[0]["heads"].equals(runs[2]["heads"])


def asked(model, seed):
    grid = {"lengths": [16, 19], "depths": [0, 0.5, 1], "each": 4}
    return key_value_needles(model.tokenizer, **grid, value_words=2, seed=seed)


@pytest.mark.parametrize("phase", ["decode", "all"])
def test_reading_from_the_context_goes_with_the_known_head_only(known_head, phase):
    found = retrieval_heads.measure(known_head, asked(known_head, 0))
    for kind in ("uniform", "zero", "mean"):
        ds = ablation(known_head, asked(known_head, 1), found, k=1, kind=kind, phase=phase)
        assert str(ds["heads"].sel(arm="top").item()) == "1-2" and ds.attrs["unmatched"] == 0
        exact = ds["exact_match"].mean("instance")
        assert float(exact.sel(arm="none")) > 0.7 and float(exact.sel(arm="top")) < 0.1
        controls = exact.isel(arm=slice(2, None))
        assert controls.size == 10 and float(controls.min()) > float(exact.sel(arm="none")) - 0.2
        assert (ds["effect"].sel(bound="low") > 0.3).all() and (ds["p"] < 0.01).all()
        assert (ds["draws_below"] == 1).all()


def test_heads_that_only_claim_to_read_have_no_effect(known_head):
    claimed = np.zeros((1, 2, 4))
    claimed[0, 1, 0] = 1
    for head in ((1, 1), (1, 2)):  # so that the known head is no control either
        claimed[0][head] = 0.2
    ds = ablation(known_head, asked(known_head, 1), scores(claimed), k=1)
    assert abs(float(ds["effect"].sel(quantity="log_prob", bound="estimate"))) < 0.3
    assert float(ds["exact_match"].sel(arm="top").mean()) > 0.7


def lives(name, place, **more):
    return Fact(id=name, split="forget", subject=name, prompt=f"{name} lives in", answer=place, **more)


def test_a_fact_in_its_context_stands_among_others_that_do_not_say_its_answer():
    places = ["Oslo", "Rome", "Oslo", "New Oslo", "Osloville", "Lima.", "Rome"]
    facts = [lives(f"N{i}", place, paraphrases=("Home of",)) for i, place in enumerate(places)]
    told = in_context(facts, among=3)
    for fact, one in zip(facts, told, strict=True):
        *lines, last = one.prompt.split("\n")
        own = f"{fact.prompt} {fact.answer.rstrip('.')}."
        assert last == fact.prompt and lines.count(own) == 1 and (one.answer, one.paraphrases) == (fact.answer, ())
        others = {line for line in lines if line != own}
        assert len(others) == len(lines) - 1 == 3
        assert others <= {f"{f.prompt} {f.answer.rstrip('.')}." for f in facts}
    assert not any(line.endswith(" Oslo.") for line in told[0].prompt.split("\n") if not line.startswith("N0"))
    assert told == in_context(facts, among=3) != in_context(facts, among=3, seed=1)
    own_places = {fact.prompt.split("\n").index(f"{fact.id} lives in {fact.answer}.") for fact in told[:5]}
    assert len(own_places) > 1
    assert told[:3] != in_context(facts[:3], among=3) and len(in_context(facts[:2])[0].prompt.split("\n")) == 3
    with pytest.raises(InputError, match="fact 'N0': every other fact says its answer 'Oslo'; give more facts"):
        in_context([facts[0], facts[2], facts[3]])


def test_a_fact_that_can_only_be_read_needs_the_known_head(known_head):
    words = known_head.tokenizer.convert_ids_to_tokens(range(6, 46))
    facts = [
        Fact(id=a, split="forget", subject=a, prompt=a, answer=b) for a, b in zip(words[::2], words[1::2], strict=True)
    ]
    asked_ = [
        fact.model_copy(update={"prompt": fact.prompt.replace(".", "").replace("\n", " ")})
        for fact in in_context(facts, among=5)
    ]
    found = retrieval_heads.measure(known_head, asked(known_head, 0))
    exact = ablation(known_head, asked_, found, k=1)["exact_match"].mean("instance")
    assert float(exact.sel(arm="none")) > 0.7 and float(exact.sel(arm="top")) < 0.1


def test_bad_input_is_told_in_one_line(make_model, some_facts):
    model, facts = make_model("llama"), of_split(some_facts, "forget")[:2]
    strange = facts[0].model_copy(update={"id": "odd", "answer": "Xyzzy"})
    own = drawn(3, (4, 4, 4))
    cases = {
        "unknown phase 'prefill'; use decode or all": lambda: ablation(model, facts, own, k=1, phase="prefill"),
        "unknown ablation 'off'; use uniform, zero, mean": lambda: ablation(model, facts, own, k=1, kind="off"),
        "at least one instance and one draw": lambda: ablation(model, [], own, k=1),
        "at least one instance and one draw ": lambda: ablation(model, facts, own, k=1, draws=0),
        "no head has a score above 0": lambda: ablation(model, facts, scores(np.zeros((1, 4, 4))), k=1),
        "instance 'odd': the answer 'Xyzzy' reads '<unk>'": lambda: ablation(model, [strange], own, k=1),
        "the scores are of 8 layers and the model has 4": lambda: ablation(model, facts, drawn(3, (4, 8, 4)), k=1),
        "heads score below 0.1 for": lambda: ablation(model, facts, scores(np.ones((1, 4, 4))), k=9),
    }
    for told, call in cases.items():
        with pytest.raises(InputError) as error:
            call()
        assert told.strip() in str(error.value) and "\n" not in str(error.value)
