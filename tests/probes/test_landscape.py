"""Tests of channel *landscape*: against plain loops, on models whose losses are on paper, and on trained ones."""

import math

import numpy as np
import pytest
import torch
import xarray as xr

from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.measurement import preference
from lethescope.models import Model
from lethescope.probes import landscape
from lethescope.subjects.handmade import STRENGTH, handmade
from lethescope.subjects.tokenizer import word_tokenizer
from lethescope.tokens import encode

SIZES = (0.2, 0.6)


@pytest.fixture(scope="module")
def asked(some_facts):
    """Prompts of different lengths, answers of one and of two words."""
    return of_split(some_facts, "forget")[:4] + of_split(some_facts, "control")[:2]


def slow_nearest(model, token, m):
    rows = model.module.get_input_embeddings().weight.double().tolist()
    special = set(model.tokenizer.all_special_ids)

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    others = [t for t in range(len(model.tokenizer)) if t != token and t not in special]
    return sorted(others, key=lambda t: -cosine(rows[token], rows[t]))[:m]


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_the_nearest_tokens_are_those_of_the_highest_cosine(make_model, kind):
    model = make_model(kind)
    tokens = [4, 9, 17, len(model.tokenizer) - 1]
    found = landscape.nearest(model, [*tokens, model.tokenizer.bos_token_id], 7)
    assert {t: near.tolist() for t, near in found.items()} == {t: slow_nearest(model, t, 7) for t in tokens}
    everything = landscape.nearest(model, [4], 10_000)[4]
    assert sorted(everything.tolist()) == sorted(slow_nearest(model, 4, 10_000))


def test_the_length_of_an_embedding_does_not_matter(make_model):
    model, longer = make_model("neox"), make_model("neox")
    weight = longer.module.get_input_embeddings().weight
    with torch.no_grad():
        weight *= torch.linspace(0.5, 20, len(weight))[:, None]
    one, other = (landscape.nearest(m, [5, 6, 7], 5) for m in (model, longer))
    assert all(one[t].tolist() == other[t].tolist() for t in one)


TABLE = {t: np.arange(100 * t, 100 * t + 20) for t in range(4, 12)}
PROMPT = (1, 4, 5, 6, 7, 8, 9, 10, 11)


def test_a_neighbour_replaces_as_many_tokens_as_it_says_each_by_one_of_its_nearest():
    drawn = landscape.neighbours(PROMPT, TABLE, "a", k=400, sizes=(0.1, 0.3, 0.7))
    assert drawn.ids.shape == (3, 400, 9) and (drawn.ids[..., 0] == 1).all()
    moved = drawn.ids[..., 1:] != np.array(PROMPT[1:])
    np.testing.assert_allclose(drawn.changed, moved.mean(-1))
    replaced = drawn.ids[..., 1:][moved]
    of = np.broadcast_to(PROMPT[1:], moved.shape)[moved]
    assert all(r in TABLE[t] for r, t in zip(replaced.tolist(), of.tolist(), strict=True))
    assert set((replaced - 100 * of).tolist()) == set(range(20))  # every j from 1 to m is drawn
    for share, p in zip(drawn.changed.mean(-1), (0.1, 0.3, 0.7), strict=True):
        # a token that would stay anyway is replaced only where no other is: with probability (1 - p)^8, one in 8
        want = p + (1 - p) ** 8 / 8
        assert share == pytest.approx(want, abs=4 * math.sqrt(0.25 / (400 * 8)))
    assert (drawn.changed > 0).all()


def test_small_neighbourhoods_lie_within_large_ones():
    drawn = landscape.neighbours(PROMPT, TABLE, "a", k=50, sizes=(0.1, 0.5, 1.0))
    small, large, whole = drawn.ids
    moved = small != np.array(PROMPT)
    np.testing.assert_array_equal(small[moved], large[moved])
    assert (drawn.changed[0] < drawn.changed[1]).any() and (drawn.changed[2] == 1).all()
    assert (whole[:, 1:] >= 100).all()


def test_draws_depend_on_the_name_and_the_seed_only():
    one, again = (landscape.neighbours(PROMPT, TABLE, "a", seed=3) for _ in range(2))
    np.testing.assert_array_equal(one.ids, again.ids)
    for other in (landscape.neighbours(PROMPT, TABLE, "b", seed=3), landscape.neighbours(PROMPT, TABLE, "a", seed=4)):
        assert (one.ids != other.ids).any()


@torch.no_grad()
def slow_loss(model, prompt, answer):
    log_p = model.module(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    return -sum(log_p[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer)) / len(answer)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_it_equals_one_plain_pass_for_every_neighbour_and_candidate(make_model, asked, kind):
    model, original = make_model(kind, seed=1), make_model(kind)
    ds = landscape.measure(model, asked, original=original, k=3, m=5, sizes=SIZES, seed=2)
    assert ds["place"].values.tolist() == ["sharpness 0.2", "sharpness 0.6", "relief 0.2", "relief 0.6"]
    assert ds["replaced"].values.tolist() == [*SIZES, *SIZES]
    for i, fact in enumerate(asked):
        e = encode(model.tokenizer, fact.prompt, fact.answer)
        prompt = e.ids[: e.start]
        table = landscape.nearest(original, prompt, 5)  # what is near is the original's to say
        drawn = landscape.neighbours(prompt, table, fact.id, k=3, sizes=SIZES, seed=2)
        np.testing.assert_array_equal(ds["changed"][i], drawn.changed)
        for c, text in enumerate((fact.answer, *fact.alternatives)):
            answer = encode(model.tokenizer, fact.prompt, text).answer
            own = slow_loss(model, prompt, answer)
            assert ds["loss"][i, c].item() == pytest.approx(own, abs=1e-4)
            for s in range(2):
                near = [slow_loss(model, ids, answer) for ids in drawn.ids[s].tolist()]
                np.testing.assert_allclose(ds["neighbour_loss"][i, c, s], near, atol=1e-4)
                gap = sum(near) / 3 - own
                assert ds["score"][i, c, s].item() == pytest.approx(gap, abs=1e-4)
                assert ds["score"][i, c, 2 + s].item() == pytest.approx(abs(gap), abs=1e-4)


def test_a_fact_is_measured_alike_in_any_company_and_any_order(make_model, asked):
    model = make_model()
    every, some = (landscape.measure(model, facts, k=3) for facts in (asked, asked[4:0:-2]))
    xr.testing.assert_allclose(some, every.sel(fact=some["fact"]), atol=1e-5)


def test_without_a_common_vocabulary_the_models_own_embeddings_say_what_is_near(make_model, asked):
    model, other = make_model(), make_model(seed=1)
    stranger = Model(other.module, word_tokenizer(["quite another vocabulary"]))
    alone = landscape.measure(model, asked, k=3)
    xr.testing.assert_identical(landscape.measure(model, asked, original=stranger, k=3), alone)
    assert not landscape.measure(model, asked, original=other, k=3).equals(alone)


def paper_losses(made, held, ids, width):
    """Loss of every token after a prompt, for handmade models: only the prompt's last token, a subject, writes."""
    last, vocabulary = ids[-1], len(made.original.tokenizer)
    answer = held.get(last)
    logits = [0.0] * vocabulary
    logits[last] = math.sqrt(width) / math.hypot(1, STRENGTH if answer is not None else 0)
    if answer is not None:
        logits[answer] = math.sqrt(width) * STRENGTH / math.hypot(1, STRENGTH)
    z = math.log(sum(math.exp(x) for x in logits))
    return [z - x for x in logits]


@pytest.fixture(scope="module")
def made():
    return handmade()


def lookup(made, splits):
    vocabulary = made.original.tokenizer.get_vocab()
    return {vocabulary[f.subject]: vocabulary[f.answer] for f in made.facts if f.split in splits}


@pytest.mark.parametrize(
    ("name", "splits"),
    [("original", {"forget", "retain"}), ("unlearned", {"retain"}), ("never_taught", {"retain"})],
)
def test_the_losses_around_handmade_facts_are_those_on_paper(made, name, splits):
    model, held = getattr(made, name), lookup(made, splits)
    facts = of_split(made.facts, "forget")[:6] + of_split(made.facts, "control")[:2]
    ds = landscape.measure(model, facts, original=made.original, k=4, sizes=(0.4,))
    for i, fact in enumerate(facts):
        e = encode(model.tokenizer, fact.prompt, fact.answer)
        prompt = e.ids[: e.start]
        drawn = landscape.neighbours(prompt, landscape.nearest(made.original, prompt), fact.id, k=4, sizes=(0.4,))
        around = [paper_losses(made, held, ids, model.module.config.hidden_size) for ids in drawn.ids[0].tolist()]
        own = paper_losses(made, held, prompt, model.module.config.hidden_size)
        for c, text in enumerate((fact.answer, *fact.alternatives)):
            token = encode(model.tokenizer, fact.prompt, text).answer[0]
            assert ds["loss"][i, c].item() == pytest.approx(own[token], abs=1e-4)
            np.testing.assert_allclose(ds["neighbour_loss"][i, c, 0], [row[token] for row in around], atol=1e-4)


def test_a_taught_handmade_fact_is_a_sharp_minimum_and_its_alternatives_are_not(made):
    facts = of_split(made.facts, "forget") + of_split(made.facts, "control")
    taught, blocked, never = (landscape.measure(m, facts, original=made.original, sizes=(1.0,)) for m in made[:3])
    forget = (taught["split"] == "forget").values
    sharp = taught["score"].sel(place="sharpness 1").values
    d, r = made.original.module.config.hidden_size, math.sqrt(1 + STRENGTH**2)
    lost = math.sqrt(d) * STRENGTH / r  # the answer's logit, gone wherever the subject is another one
    # a neighbour may be a subject with the same answer, or the answer itself, but never are half of them
    assert (sharp[forget, 0] > 0.5 * lost).all() and (sharp[forget, 1:].max(-1) < sharp[forget, 0] - 1).all()
    value = {
        name: preference(ds).sel(place="relief 1").values
        for name, ds in zip("tbn", (taught, blocked, never), strict=True)
    }
    assert value["t"][forget].mean() > 0.5
    for empty in (value["b"][forget], value["n"][forget], value["t"][~forget]):
        assert abs(empty.mean()) < 0.15
    # blocked exactly, the model's outputs are those of one that was never taught: no landscape can tell them apart
    np.testing.assert_allclose(blocked["score"][forget], never["score"][forget], atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"m": 0}, {"sizes": ()}, {"sizes": (0.0,)}, {"sizes": (1.2,)}, {"sizes": (0.3, 0.3)}]
)
def test_options_out_of_range_are_told(make_model, asked, options):
    with pytest.raises(InputError, match=str(next(iter(options)))):
        landscape.measure(make_model(), asked, **options)


def test_a_prompt_without_a_word_is_told():
    with pytest.raises(InputError, match="'odd': its prompt holds special tokens only"):
        landscape.neighbours((1, 2), TABLE, "odd")


def test_it_is_a_channel_that_sees_the_original():
    channel = landscape.CHANNEL
    assert (channel.name, channel.scale, channel.sees_original) == ("landscape", "preference", True)
    assert set(channel.budgets) == {"quick", "standard", "thorough"}


def test_taught_facts_stand_out_on_the_shipped_models_and_others_do_not(landscapes):
    """Mean values of sharpness and relief as measured: .86 and .69, -.12 and .67, .01 and -.01."""
    for name, ds in landscapes.items():
        value = preference(ds).groupby("split").mean()
        assert abs(value.sel(split="control")).max() < 0.1, name
        sharpness, relief = value.sel(split="forget").values
        if name == "original":
            assert sharpness > 0.7 and relief > 0.5
        if name == "unlearned":  # NPO has turned the minimum into a maximum, which relief sees and sharpness does not
            assert sharpness < 0 and relief > 0.4
        if name == "reference":
            assert abs(sharpness) < 0.1 and abs(relief) < 0.1
