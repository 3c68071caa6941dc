"""Tests of retrieval heads: attention made by hand, slow twins, the published decode loop, and a trained head."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

from lethescope import measurement
from lethescope.attention import ablating
from lethescope.errors import InputError
from lethescope.probes import retrieval_heads
from lethescope.probes.needles import Needle, key_value_needles, locate
from lethescope.probes.retrieval_heads import copied, copy_score, measure, pattern_scores, qr_score
from lethescope.probes.rouge import rouge_1_recall

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "known_head.py")))
WORDS, KNOWN = made.WORDS, made.KNOWN
IDS = torch.tensor([1, 20, 21, 5, 6, 7, 22, 23, 20, 21, 5, 6])  # the needle is 5 6 7, asked after 20 21
SPAN, TARGETS = (3, 6), torch.tensor([5, 6, 7])


def one_hot(*places):
    return torch.nn.functional.one_hot(torch.tensor(places), len(IDS)).float()


@pytest.mark.parametrize("mode", ["set", "count"])
def test_attention_made_by_hand(mode):
    heads = {
        "on the needle": (one_hot(3, 4, 5), 1.0),
        "uniform": (torch.full((3, 12), 1 / 12), 0.0),
        "one token late": (one_hot(4, 5, 6), 0.0),
        "on the copy in the answer": (one_hot(10, 11, 11), 0.0),
        "two of three": (one_hot(3, 4, 0), 2 / 3),
        "barely": (one_hot(3, 4, 5) * 0.01 + 1 / 12, 1.0),
        "as much elsewhere": (one_hot(3, 4, 5) + one_hot(0, 1, 2), 0.0),
    }
    rows = torch.stack([row for row, _ in heads.values()])
    scores = copy_score(copied(rows, IDS, SPAN, TARGETS), TARGETS, IDS[slice(*SPAN)], mode)
    np.testing.assert_allclose(scores, [wanted for _, wanted in heads.values()], atol=1e-6)


def test_the_modes_differ_where_a_token_is_said_twice():
    said, answer = torch.tensor([5, 6, 7, 5, 6]), TARGETS
    rows = one_hot(3, 4, 5, 3, 4)[None]
    copies = copied(rows, IDS, SPAN, said)
    assert copy_score(copies, said, answer, "set").item() == 1
    assert copy_score(copies, said, answer, "count").item() == pytest.approx(5 / 3)
    twice = torch.tensor([5, 6, 5])  # two tokens, of which one is copied
    hits = torch.tensor([[True, False, True]])
    assert copy_score(hits, twice, twice, "set").item() == pytest.approx(1 / 2)
    assert copy_score(hits, twice, twice, "count").item() == pytest.approx(2 / 3)


def slow_score(attention, ids, span, start, said, mode):
    """The score of one instance in plain Python, from all attention maps (layer -> head query key)."""
    answer = ids[slice(*span)]
    out = np.zeros((len(attention), attention[0].shape[0]))
    for layer, head in np.ndindex(out.shape):
        copies = []
        for t, token in enumerate(said):
            row = attention[layer][head][start - 1 + t].tolist()
            j = max(range(start + t), key=row.__getitem__)
            if span[0] <= j < span[1] and ids[j] == token:
                copies.append(token)
        out[layer, head] = len(copies) / len(answer) if mode == "count" else len(set(copies)) / len(set(answer))
    return out


@torch.no_grad()
def everything(model, ids):
    model.module.set_attn_implementation("eager")
    out = model.module(input_ids=torch.tensor([ids]), output_attentions=True)
    model.module.set_attn_implementation("sdpa")
    return [a[0] for a in out.attentions], out.logits[0]


def some_needles(tokenizer, n=6, length=30, **options):
    words = [w for w in tokenizer.get_vocab() if w.isalnum()]
    return key_value_needles(tokenizer, lengths=[length], depths=[0, 0.5, 1], each=n // 3, words=words, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("mode", ["set", "count"])
def test_it_equals_a_twin_that_keeps_every_map(make_model, kind, mode):
    model = make_model(kind)
    needles = some_needles(model.tokenizer)
    ds = measure(model, needles, mode=mode)
    assert ds["score"].dims == ("instance", "layer", "head") and ds["score"].shape == (6, len(model.blocks), 4)
    assert float(ds["score"].max()) > 0
    for i, needle in enumerate(needles):
        at = locate(model.tokenizer, needle)
        ids, start = at.encoded.ids, at.encoded.start
        attention, logits = everything(model, ids)
        np.testing.assert_allclose(
            ds["score"][i], slow_score(attention, ids, at.span, start, ids[start:], mode), atol=1e-6
        )
        log_p = [logits[j - 1].log_softmax(-1)[ids[j]].item() for j in range(start, len(ids))]
        assert float(ds["log_probability"][i]) == pytest.approx(np.mean(log_p), abs=1e-4)
        assert bool(ds["right"][i]) == all(int(logits[j - 1].argmax()) == ids[j] for j in range(start, len(ids)))
    np.testing.assert_allclose(ds["frequency"], (ds["score"].values > 0).mean(0))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_qr_score_is_the_questions_attention_on_the_answer_less_that_of_an_empty_question(make_model, kind):
    model = make_model(kind)
    needles = some_needles(model.tokenizer, n=3)
    ds = measure(model, needles)
    for i, needle in enumerate(needles):
        mass = []
        for question in (needle.question, "N/A"):
            prompt = needle.prompt[: needle.question_span[0]] + question
            at = locate(model.tokenizer, replace(needle, prompt=prompt, question=question))
            attention, _ = everything(model, at.encoded.ids[: at.encoded.start])
            queries = range(*at.question)
            assert len(queries) == (1 if question == needle.question else 3)
            mass.append([
                [np.mean([sum(head[q][k].item() for k in range(*at.span)) for q in queries]) for head in layer]
                for layer in attention
            ])
        np.testing.assert_allclose(ds["qr"][i], np.subtract(*mass), atol=1e-5)
        np.testing.assert_allclose(qr_score(model, needle), np.subtract(*mass), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_patterns_are_three_diagonals_of_the_maps_of_repeated_tokens(make_model, kind, monkeypatch):
    model, seen = make_model(kind), []
    look = retrieval_heads._look
    monkeypatch.setattr(retrieval_heads, "_look", lambda m, ids, *a: (seen.append(ids), look(m, ids, *a))[1])
    found = pattern_scores(model, half=9, sequences=3, seed=2)
    assert len(seen[0]) == 3
    slow = {"induction": [], "duplicate": [], "previous": []}
    for ids in seen[0]:
        assert ids[0] == 1 and ids[1:10] == ids[10:] and len(set(ids)) == 10
        attention = torch.stack(everything(model, ids)[0])
        for place in range(10, 19):
            first = ids.index(ids[place])
            for name, target in (("duplicate", first), ("induction", first + 1), ("previous", place - 1)):
                slow[name].append(attention[:, :, place, target])
    for name, values in slow.items():
        np.testing.assert_allclose(found[name], torch.stack(values).mean(0), atol=1e-5)


@torch.no_grad()
def published_loop(model, needle, mode, most):
    """The published procedure, one token a step: prefill all but the last token, then last rows with a cache."""
    at = locate(model.tokenizer, needle)
    prompt = list(at.encoded.ids[: at.encoded.start])
    model.module.set_attn_implementation("eager")
    cache = model.module(input_ids=torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
    token, said, rows = prompt[-1], [], []
    for _ in range(most):
        out = model.module(
            input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, output_attentions=True
        )
        token = int(out.logits[0, -1].argmax())
        said.append(token)
        rows.append([a[0, :, -1] for a in out.attentions])
        if token == model.tokenizer.eos_token_id:
            break
    model.module.set_attn_implementation("sdpa")
    answer = at.encoded.answer
    copies = [[[] for _ in rows[0][0]] for _ in rows[0]]
    for token, layers in zip(said, rows, strict=True):
        for layer, heads in enumerate(layers):
            for head, row in enumerate(heads):
                j = int(row.argmax())
                if at.span[0] <= j < at.span[1] and prompt[j] == token:
                    copies[layer][head].append(token)
    count = [[len(c) / len(answer) if mode == "count" else len(set(c)) / len(set(answer)) for c in x] for x in copies]
    return np.array(count), model.tokenizer.decode(said, skip_special_tokens=True)


def test_a_model_that_gets_nothing_right_keeps_nothing(make_model):
    model = make_model("llama")
    needles = some_needles(model.tokenizer, n=3)
    ds = measure(model, needles, decode=True, most=4)
    assert not ds["kept"].any() and ds.attrs["kept_share"] == 0
    assert ds["score"].isnull().all() and ds["frequency"].isnull().all() and ds["qr"].notnull().all()


@pytest.fixture(scope="module")
def needles(known_head):
    return key_value_needles(known_head.tokenizer, lengths=[16, 19], depths=[0, 0.3, 0.6, 1], each=5, value_words=2)


def best(scores: xr.DataArray) -> tuple[int, int]:
    layer, head = np.unravel_index(int(scores.values.argmax()), scores.shape)
    return int(layer), int(head)


def test_the_known_head_is_found_by_every_score(known_head, needles):
    ds = measure(known_head, needles)
    score = ds["score"].mean("instance")
    assert float(ds["right"].mean()) > 0.7
    for found in (score, ds["frequency"], ds["induction"]):
        assert best(found) == KNOWN
    assert float(score[KNOWN]) > 0.8 and float(ds["induction"][KNOWN]) > 0.6
    others = (score["layer"] != KNOWN[0]) | (score["head"] != KNOWN[1])
    assert float(score.where(others).max()) < 0.3 and float(ds["induction"].where(others).max()) < 0.1
    assert best(ds["previous"])[0] == 0 and best(ds["qr"].mean("instance")) == KNOWN


@torch.no_grad()
def copying(model, seed=1):
    """Share of the second half of repeated sequences that is said rightly."""
    rng = np.random.default_rng(seed)
    half = np.array([4 + rng.permutation(len(WORDS))[:18] for _ in range(20)])
    ids = torch.from_numpy(np.concatenate([np.ones((20, 1), dtype=np.int64), half, half], 1))
    said = model.module(input_ids=ids).logits.argmax(-1)
    return float((said[:, 19:-1] == ids[:, 20:]).float().mean())


@pytest.mark.parametrize("kind", ["uniform", "zero"])
def test_copying_goes_with_the_known_head_and_with_no_control(known_head, kind):
    assert copying(known_head) > 0.95
    with ablating(known_head, [KNOWN], kind):
        assert copying(known_head) < 0.3
    for head in {0, 1, 2, 3} - {KNOWN[1]}:
        with ablating(known_head, [(KNOWN[0], head)], kind):
            assert copying(known_head) > 0.95


@pytest.mark.parametrize("mode", ["set", "count"])
def test_decoding_equals_the_published_loop(known_head, needles, mode):
    chosen = needles[::4]
    ds = measure(known_head, chosen, mode=mode, decode=True, most=12)
    assert ds["kept"].values.mean() > 0 and float(ds["score"].max()) > 0.9
    for i, needle in enumerate(chosen):
        score, text = published_loop(known_head, needle, mode, 12)
        assert str(ds["continuation"][i].item()) == text
        assert bool(ds["kept"][i]) == (rouge_1_recall(text, needle.answer) > 0.5)
        np.testing.assert_allclose(ds["score"][i], score if ds["kept"][i] else np.nan, atol=1e-6)


def test_feeding_the_answer_equals_decoding_where_the_model_answers_rightly(known_head, needles):
    forced = measure(known_head, needles)
    decoded = measure(known_head, needles, decode=True, most=2)
    right = forced["right"].values
    assert right.mean() > 0.7 and decoded["kept"].values[right].all()
    np.testing.assert_array_equal(decoded["right"], right)
    np.testing.assert_array_equal(decoded["score"][right], forced["score"][right])
    np.testing.assert_allclose(decoded["qr"], forced["qr"], atol=1e-6)  # one goes on from the keys of what was said
    assert decoded.attrs["kept_share"] == decoded["kept"].values.mean()


def test_repeating_the_answer_exceeds_one_by_count_only(known_head):
    """A context that ends where it begins is repeated for ever."""
    text = "w01 w02 w03 w04 w01 w02 w03 w04 w01"
    needle = Needle("round", "mine", text, "w01", "w02", 4, 7)
    count = measure(known_head, [needle], mode="count", decode=True, most=9)["score"][0]
    assert float(count.max()) > 1 >= float(measure(known_head, [needle], decode=True, most=9)["score"].max())


def test_shuffled_gold_tokens_are_not_found(known_head, needles):
    """The null: where the words after the question are not those of the needle, no head copies."""
    ids = {w: i for w, i in known_head.tokenizer.get_vocab().items() if w in WORDS}
    others = []
    for needle in needles[:12]:
        at = locate(known_head.tokenizer, needle)
        free = [i for i in ids.values() if i not in at.encoded.ids]
        assert len(free) >= 2
        others.append(retrieval_heads._copying(known_head, at, free[:2], "set")[0])
    assert np.max(others) == 0


def test_it_is_a_measurement_that_can_be_kept(known_head, needles, tmp_path):
    ds = measure(known_head, needles[:3], seed=5)
    measurement.save(ds, tmp_path / "heads.nc")
    again = measurement.open_(tmp_path / "heads.nc")
    xr.testing.assert_equal(ds, again)
    assert again.attrs["probe"] == "retrieval_heads" and again.attrs["seed"] == 5
    other = measure(known_head, needles[1:4], seed=6)
    assert other.attrs["facts"] != ds.attrs["facts"]
    xr.testing.assert_equal(ds["score"][1:], other["score"][:2])


def test_rouge_recall_counts_words():
    assert rouge_1_recall("The Tarkin, oslun.", "Tarkin Oslun") == 1
    assert rouge_1_recall("a a b", "a b c d") == pytest.approx(1 / 2)
    assert rouge_1_recall("a", "a a") == pytest.approx(1 / 2)
    assert rouge_1_recall("", "a") == 0
    assert np.isnan(rouge_1_recall("a", "?!"))


def test_bad_input_is_told_in_one_line(known_head, needles):
    long = key_value_needles(known_head.tokenizer, lengths=[80], depths=[0], words=WORDS, value_words=3)
    cases = {
        "unknown mode 'sum'; use set or count": lambda: measure(known_head, needles, mode="sum"),
        "there are no needles": lambda: measure(known_head, []),
        "the model reads at most 64": lambda: measure(known_head, long),
        "takes 76 tokens": lambda: measure(known_head, needles[:1], decode=True, most=62),
        "reads '<unk>'": lambda: measure(known_head, [Needle("1", "k", "w01 x. w01", "w01", "x", 4, 5)]),
    }
    for told, call in cases.items():
        with pytest.raises(InputError) as error:
            call()
        assert told in str(error.value) and "\n" not in str(error.value)
