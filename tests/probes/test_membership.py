"""Tests of membership scores: each against a slow twin that follows its formula token by token."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lethescope import probes
from lethescope.auc import auc
from lethescope.errors import InputError
from lethescope.facts import of_split, read_facts
from lethescope.models import Model, load
from lethescope.probes import membership
from lethescope.subjects import shipped
from lethescope.subjects.tokenizer import word_tokenizer
from lethescope.tokens import encode

LOG_P = st.lists(st.floats(-30, 0), min_size=1, max_size=9)
K = st.sampled_from([0.1, 0.2, 0.4, 0.5, 0.9, 1.0])


def padded(rows):
    out = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def slow_min_k(row, k):
    count = 1
    while (count + 1) <= k * len(row):
        count += 1
    return sum(sorted(row)[:count]) / count


@given(st.lists(LOG_P, min_size=1, max_size=5), K)
def test_loss_and_min_k_follow_their_definitions(rows, k):
    np.testing.assert_allclose(membership.loss(padded(rows)), [sum(r) / len(r) for r in rows])
    np.testing.assert_allclose(membership.min_k(padded(rows), k), [slow_min_k(r, k) for r in rows], atol=1e-12)


@given(st.lists(LOG_P, min_size=1, max_size=5))
def test_min_k_of_all_tokens_is_loss_and_fewer_tokens_are_never_higher(rows):
    table = padded(rows)
    np.testing.assert_allclose(membership.min_k(table, 1.0), membership.loss(table), atol=1e-12)
    scores = [membership.min_k(table, k) for k in (0.2, 0.4, 1.0)]
    assert (scores[0] <= scores[1] + 1e-9).all() and (scores[1] <= scores[2] + 1e-9).all()


@given(st.lists(st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0), st.floats(0, 3)), min_size=1), min_size=1), K)
def test_min_k_plus_plus_standardises_each_token(rows, k):
    log_p, mean, deviation = (padded([[t[i] for t in row] for row in rows]) for i in range(3))
    slow = [slow_min_k([(x - m) / max(s, 1e-3) for x, m, s in row], k) for row in rows]
    np.testing.assert_allclose(membership.min_k_plus_plus(log_p, mean, deviation, k), slow, rtol=1e-9, atol=1e-9)


def test_zlib_divides_by_the_compressed_bytes_and_reference_subtracts():
    table, other = padded([[-1.0, -3.0], [-4.0]]), padded([[-2.0, -2.5], [-1.0]])
    texts = ["aaaaaaaaaaaaaaaaaaaa", "Zürich"]
    lengths = [len(zlib.compress(t.encode("utf-8"))) for t in texts]
    np.testing.assert_allclose(membership.zlib_ratio(table, texts), [-2 / lengths[0], -4 / lengths[1]])
    np.testing.assert_allclose(membership.calibrated(table, other), [0.25, -3.0])


@torch.no_grad()
def slow_scores(model, reference, fact, k):
    """One plain pass over one fact, token by token."""
    e = encode(model.tokenizer, fact.prompt, fact.answer)
    every = [m.module(input_ids=torch.tensor([e.ids])).logits[0].double().log_softmax(-1) for m in (model, reference)]
    tokens, standard, other = [], [], []
    for i in range(e.start, len(e.ids)):
        log_p = every[0][i - 1].tolist()
        mean = sum(math.exp(x) * x for x in log_p)
        variance = sum(math.exp(x) * (x - mean) ** 2 for x in log_p)
        tokens.append(log_p[e.ids[i]])
        standard.append((tokens[-1] - mean) / math.sqrt(variance))
        other.append(every[1][i - 1, e.ids[i]].item())
    mean = sum(tokens) / len(tokens)
    return {
        "loss": mean,
        "zlib": mean / len(zlib.compress(fact.answer.encode())),
        "min_k": slow_min_k(tokens, k),
        "min_k_plus_plus": slow_min_k(standard, k),
        "reference": mean - sum(other) / len(other),
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("k", [0.4, 1.0])
def test_measure_gives_what_single_plain_passes_give(make_model, some_facts, kind, k):
    model, reference = make_model(kind), make_model(kind, seed=1)
    facts = some_facts[:12]
    ds = membership.measure(model, facts, reference=reference, k=k)
    assert ds["fact"].values.tolist() == [f.id for f in facts]
    assert ds.attrs["direction"] == "higher = more member-like"
    for i, fact in enumerate(facts):
        for name, want in slow_scores(model, reference, fact, k).items():
            assert ds[name][i].item() == pytest.approx(want, abs=1e-4), name


def test_without_a_reference_there_is_no_reference_score(make_model, some_facts):
    names = {"loss", "zlib", "min_k", "min_k_plus_plus"}
    assert set(membership.measure(make_model(), some_facts[:3]).data_vars) == names


def test_bad_input_is_told(make_model, some_facts):
    model = make_model()
    for k in (0, 1.5, math.nan):
        with pytest.raises(InputError, match="it is a share"):
            membership.measure(model, some_facts[:3], k=k)
    other = Model(model.module, word_tokenizer(["quite another vocabulary"]))
    with pytest.raises(InputError, match="another vocabulary"):
        membership.measure(model, some_facts[:3], reference=other)


def test_higher_is_more_member_like_on_the_shipped_models():
    """The original was taught forget and not control, the reference neither."""
    facts = [f for f in read_facts(shipped("facts")) if f.split != "retain"]
    original, reference = load(shipped("original")), load(shipped("reference"))
    ds = membership.measure(original, facts, reference=reference)
    null = membership.measure(reference, facts)
    forget, control = (ds["split"] == split for split in ("forget", "control"))
    assert forget.sum() == len(of_split(facts, "forget"))
    for name in ds.data_vars:
        assert auc(ds[name][forget], ds[name][control]) > 0.9, name  # 1, 1, 1, .98, .934
        if name in null:
            assert 0.35 < auc(null[name][forget], null[name][control]) < 0.65, name


def test_it_is_no_channel():
    assert "membership" not in probes.CHANNELS and "rouge" not in probes.CHANNELS
