"""Tests of channel *emphasise*: the comparison on paper, the templates by eye, and the attack against *say*."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lethescope import measurement
from lethescope.analyses import emphasis
from lethescope.analyses.emphasis import CHANNEL, TEMPLATES, compare, leaks, recovery_rate
from lethescope.analyses.patch import null_facts
from lethescope.analyses.residue import residue
from lethescope.cells import Bench, Cell
from lethescope.errors import InputError
from lethescope.facts import Fact, of_split
from lethescope.models import Model, fingerprint
from lethescope.probes import attribution, say
from lethescope.probes.prompt_words import words
from lethescope.runs import Store
from lethescope.subjects.handmade import handmade, lookup_facts
from lethescope.subjects.tokenizer import fact_tokenizer, word_tokenizer

KINDS = ("llama", "gpt2", "neox")


def attributed(rows, texts=None, subjects=None):
    """Attributions as `attribution.measure` gives them."""
    width = max(map(len, rows))
    texts = texts or [[f"w{i}{k}" for k in range(len(row))] for i, row in enumerate(rows)]
    table = [[*row, *[np.nan] * (width - len(row))] for row in rows]
    named = [[*row, *[""] * (width - len(row))] for row in texts]
    return xr.Dataset(
        {
            "contribution": (("fact", "unit"), np.array(table, dtype=float)),
            "unit_text": (("fact", "unit"), named),
            "log_probability": ("fact", np.full(len(rows), -1.0)),
        },
        {
            "fact": [str(i) for i in range(len(rows))],
            "subject": ("fact", subjects or [f"s{i}" for i in range(len(rows))]),
        },
    )


def test_the_comparison_on_paper():
    before = attributed([[4, 2, 1, 0.4, -1], [1, -1], [-1, -2, -3]])
    after = attributed([[1, 4, 1, -2, 2], [2, 1], [1, 2, 3]])
    found = compare(before, after)
    # K0 = {0, 1}, for 0.3 * 4 > 1; Ku = {1, 4}, for 0.3 * 4 > 1
    assert found["jaccard"].values.tolist() == pytest.approx([1 / 3, 1 / 2, 0.0])
    assert found["keyword_mass"].values[:2].tolist() == pytest.approx([(1 + 4) / (1 + 4 + 1 + 2), 2 / 3])
    assert found["keyword_mass"].values[2] == 0  # it had no key before
    assert found["top1_agreement"].values.tolist() == pytest.approx([0, 1, np.nan], nan_ok=True)
    want = [stats.spearmanr([4, 2, 1, 0.4, -1], [1, 4, 1, -2, 2]).statistic, np.nan, -1]
    assert found["spearman"].values.tolist() == pytest.approx(want, nan_ok=True)
    assert found["log_probability_before"].values.tolist() == [-1.0] * 3


def test_equal_attributions_agree_and_lose_nothing(make_model, some_facts):
    ds = attribution.measure(make_model(), some_facts[:6])
    found = compare(ds, ds)
    for name in ("jaccard", "spearman", "keyword_mass", "top1_agreement"):
        if name != "keyword_mass":
            np.testing.assert_allclose(found[name], 1)
    assert (found["keyword_mass"] > 0.5).all()
    assert found["common_token_penalty"].isnull().all()


def test_the_comparison_sees_order_and_not_size(make_model, some_facts):
    before, after = (attribution.measure(make_model(seed=s), some_facts[:6]) for s in (0, 1))
    found = compare(before, after)
    larger = after.assign(contribution=3 * after["contribution"])
    turned = [ds.isel(unit=slice(None, None, -1)) for ds in (before, after)]
    for name in ("jaccard", "spearman", "keyword_mass", "top1_agreement"):
        np.testing.assert_allclose(compare(before, larger)[name], found[name])
        np.testing.assert_allclose(compare(*turned)[name], found[name])
    assert found["spearman"].min() < 0.9


def test_unrelated_attributions_have_no_rank_correlation():
    rng = np.random.default_rng(0)
    found = compare(*(attributed(rng.normal(size=(400, 8)).tolist()) for _ in range(2)))
    assert abs(found["spearman"].mean()) < 4 / np.sqrt(400 * 7)
    assert found["top1_agreement"].mean() == pytest.approx(1 / 8, abs=4 * np.sqrt(7 / 64 / 400))


def test_the_penalty_is_the_share_lost_on_words_that_many_subjects_share():
    texts = [["Where", "was", "Ada", "born?"], ["Born", "was", "Ben", "in"], ["Cleo", "sings"]]
    subjects = ["Ada", "Ben", "Cleo"]
    before = attributed([[1, 1, 4, 2], [1, 1, 1, 1], [1, 1]], texts, subjects)
    after = attributed([[1, 0, 2, 1], [2, 1, 1, 0], [2, 2]], texts, subjects)
    # "was" and "born" are in the prompts of two subjects; the first fact lost 1 on each and 2 on "Ada"
    found = compare(before, after)["common_token_penalty"].values.tolist()
    assert found == pytest.approx([2 / 4, 0 / 1, np.nan], nan_ok=True)
    assert compare(before, after, common=0.7)["common_token_penalty"].values[0] == 0
    one = [ds.assign_coords(subject=("fact", ["Ada"] * 3)) for ds in (before, after)]
    assert compare(*one)["common_token_penalty"].values[0] == 0  # one subject says it twice


def test_a_unit_of_many_words_is_common_when_all_are():
    texts = [["was born", "was Ada"], ["was born", "Ben"]]
    found = [attributed(rows, texts) for rows in ([[2, 2], [2, 2]], [[1, 0], [1, 0]])]
    assert compare(*found)["common_token_penalty"].values.tolist() == pytest.approx([1 / 3, 1 / 3])


def test_blocking_takes_the_words_support_and_leaves_that_of_retain_facts():
    made = handmade()
    before, after = (attribution.measure(m, made.facts) for m in (made.original, made.unlearned))
    found = compare(before, after)
    forget, retain = (found.isel(fact=(before["split"] == s).values) for s in ("forget", "retain"))
    np.testing.assert_allclose(retain["spearman"], 1)
    np.testing.assert_allclose(retain["jaccard"], 1)
    assert (forget["jaccard"] == 0).all()
    assert forget["keyword_mass"].isnull().all()
    np.testing.assert_allclose(forget["common_token_penalty"], 0)  # all that was lost was the subject's
    assert (forget["log_probability_after"] < forget["log_probability_before"] - 5).all()


def test_only_the_same_prompts_can_be_compared(make_model, some_facts):
    model = make_model()
    one, two = (attribution.measure(model, some_facts[i : i + 2]) for i in (0, 2))
    with pytest.raises(InputError, match="not of the same prompts"):
        compare(one, two)
    with pytest.raises(InputError, match="not of the same prompts"):
        compare(one, attribution.measure(model, some_facts[:2], units="subject"))


def written(name, prompt, chosen, tokenizer=None):
    return TEMPLATES[name][1](words(prompt, tokenizer), chosen)


def test_the_templates_by_eye():
    question = "Where was Ada's mother born?\nAnswer:"
    assert written("quoted", question, [2, 4]) == 'Where was "Ada\'s" mother "born"?\nAnswer:'
    assert written("uppercase", question, [2, 4]) == "Where was ADA'S mother BORN?\nAnswer:"
    assert written("starred", question, [2, 4]) == "Where was **Ada's** mother **born**?\nAnswer:"
    assert written("attention", question, [2, 4]) == (
        "Where was Ada's mother born?\nPay attention to: Ada's, born.\nAnswer:"
    )
    assert written("repeated", "Ada is Ada. Answer: the", [0, 2]) == "Ada is Ada.\nAda.\nAnswer: the"
    assert written("repeated", "Ada was born in", [0, 2]) == "Ada was born in\nAda, born.\nAda was born in"
    assert written("repeated", "Dr. Ada was born in ", [1]) == "Dr. Ada was born in \nAda.\nDr. Ada was born in "


def test_in_a_chat_the_note_stands_in_the_users_turn():
    tokenizer = word_tokenizer(["user Where was Ada born? assistant"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat = "<|im_start|>user\nWhere was Ada born?<|im_end|>\n<|im_start|>assistant\n"
    noted = chat.replace("born?", "born?\nPay attention to: Ada.")
    assert written("attention", chat, [2], tokenizer) == noted
    assert written("quoted", chat, [2], tokenizer) == chat.replace("Ada", '"Ada"')


def test_there_are_four_families():
    assert {family for family, _ in TEMPLATES.values()} == {"in place", "pay attention", "repeated", "marked"}
    asked = {budget: {TEMPLATES[name][0] for name in o["templates"]} for budget, o in CHANNEL.budgets.items()}
    assert asked["quick"] == {"in place", "pay attention"}  # two of them, for time
    assert asked["standard"] == asked["thorough"] == {family for family, _ in TEMPLATES.values()}


@given(text=st.text(alphabet="ab?. \n", max_size=20), chosen=st.sets(st.integers(0, 9)))
def test_in_place_only_the_chosen_words_change(text, chosen):
    found = emphasis.in_place(words(text), chosen, "<{}>".format)
    assert found.replace("<", "").replace(">", "") == text
    assert found.count("<") == len(chosen & set(range(len(text.split()))))


def test_leaks():
    assert leaks("Where? Pay attention to: Velmora.", "Where?", "Velmora")
    assert leaks("parisian", "", "Paris")
    assert leaks("Say it: wine.", "Say it:", "wine merchant")
    assert not leaks("Of the wine? wine", "Of the wine? wine", "wine merchant")  # it was there already
    assert leaks("wine, wine", "wine", "wine merchant")
    assert not leaks("Pay attention to: the.", "", "the Hague")  # no telling word
    assert leaks("Say: ox.", "", "ox")
    assert not leaks("Say: oxen.", "", "ox")
    assert leaks("東京都", "", "東京")


@pytest.fixture(scope="module")
def asked(some_facts):
    """Forget, retain and control facts, statements and questions."""
    chosen = [of_split(some_facts, split)[:4] for split in ("forget", "retain", "control")]
    facts = [fact for facts in chosen for fact in facts]
    return [f if i % 2 else f.model_copy(update={"prompt": f.paraphrases[1]}) for i, f in enumerate(facts)]


def slow_keys(model, fact):
    """The words whose loss costs the answer something: all of fewer than three, else the strong ones; at least one."""
    alone = attribution.measure(model, [fact])["contribution"].values[0]
    supports = [c for c in alone if c > 0]
    found = [i for i, c in enumerate(alone) if c > 0 and (len(supports) < 3 or c > 0.3 * max(supports))]
    return found or [int(alone.argmax())]


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_what_say_finds_on_a_prompt_with_the_originals_keys(make_model, asked, kind):
    original, model = make_model(kind), make_model(kind, seed=1)
    before = fingerprint(model.module)
    ds = emphasis.measure(model, asked, original=original)
    assert fingerprint(model.module) == before
    assert ds["place"].values.tolist() == list(TEMPLATES)
    assert ds["family"].values.tolist() == [family for family, _ in TEMPLATES.values()]
    plain = say.measure(model, asked)
    np.testing.assert_allclose(ds["plain_score"], plain["log_probability"][:, 0], atol=1e-5)
    np.testing.assert_array_equal(ds["greedy"], plain["greedy"][:, 0])
    keys = [slow_keys(original, f) for f in asked]
    assert keys != [slow_keys(model, f) for f in asked]
    assert ds["keys"].values.tolist() == [
        " ".join(f.prompt.split()[i] for i in some) for f, some in zip(asked, keys, strict=True)
    ]
    for name in TEMPLATES:
        texts = [written(name, f.prompt, some) for f, some in zip(asked, keys, strict=True)]
        rewritten = [f.model_copy(update={"prompt": t, "paraphrases": ()}) for f, t in zip(asked, texts, strict=True)]
        said = say.measure(model, rewritten)
        np.testing.assert_allclose(ds["score"].sel(place=name), said["log_probability"][:, 0], atol=1e-5)
        np.testing.assert_array_equal(ds["greedy_emphasised"].sel(place=name), said["greedy"][:, 0])


def test_the_placebo_is_as_many_words_that_are_no_keys(make_model, asked):
    model = make_model()
    keys, placebo = emphasis.chosen_words(model, asked, seed=0)
    for fact, stressed, others in zip(asked, keys, placebo, strict=True):
        assert not set(stressed) & set(others)
        assert len(others) == min(len(stressed), len(fact.prompt.split()) - len(stressed))
        assert set(others) <= set(range(len(fact.prompt.split())))
    assert any(placebo)
    turned = emphasis.chosen_words(model, asked[::-1], seed=0)
    assert (turned[0][::-1], turned[1][::-1]) == (keys, placebo)  # a fact's draw does not depend on the others
    again = [emphasis.chosen_words(model, asked, seed=s)[1] for s in range(8)]
    assert again[0] == placebo
    assert any(draw != placebo for draw in again)


def test_the_placebo_is_scored_like_the_keys(make_model, asked):
    original, model = make_model(), make_model(seed=1)
    ds = emphasis.measure(model, asked, original=original, seed=3, templates=("repeated",))
    placebo = emphasis.chosen_words(original, asked, seed=3)[1]
    for i, (fact, some) in enumerate(zip(asked, placebo, strict=True)):
        if not some:
            assert ds["placebo_score"][i].isnull().all()
            assert ds["greedy_placebo"][i].isnull().all()
            continue
        one = fact.model_copy(update={"prompt": written("repeated", fact.prompt, some), "paraphrases": ()})
        np.testing.assert_allclose(
            ds["placebo_score"][i, :, 0], say.measure(model, [one])["log_probability"][0, 0], atol=1e-5
        )
    assert not np.allclose(ds["placebo_score"], ds["score"], atol=1e-2, equal_nan=True)


def test_the_null_is_the_placebo_on_never_taught_subjects_and_only_the_original_has_it(make_model, asked, monkeypatch):
    original, model = make_model(), make_model(seed=1)
    assert "null_score" not in emphasis.measure(model, asked, original=original)
    monkeypatch.setattr(emphasis, "_draw", lambda pool, count, _seed, _fact: pool[:count])
    ds = emphasis.measure(original, asked, original=original, templates=("starred", "attention"))
    forget = of_split(asked, "forget")
    keys = emphasis.chosen_words(original, forget, seed=0)[0]
    for i, (fact, other) in enumerate(zip(forget, null_facts(asked, 0), strict=True)):
        taboo = {fact.prompt.split()[k] for k in keys[i]}
        free = [k for k, word in enumerate(other.prompt.split()) if word not in taboo][: len(keys[i])]
        for place in ("starred", "attention"):
            one = other.model_copy(update={"prompt": written(place, other.prompt, free)})
            want = say.measure(original, [one])["log_probability"][0, 0]
            np.testing.assert_allclose(ds["null_score"].sel(place=place)[i], want, atol=1e-5)
    assert ds["null_score"][len(forget) :].isnull().all()
    alone = emphasis.measure(original, forget, original=original, templates=("starred",))
    assert alone["null_score"].isnull().all()  # nobody was never taught


def test_answers_are_not_given_away(make_model):
    facts = [
        Fact(id="1", split="forget", subject="Ada", prompt="the Velmora guild took Ada to", answer="Velmora"),
        Fact(id="2", split="forget", subject="Ben", prompt="the guild took Ben to", answer="Pay"),
    ]
    tokenizer = fact_tokenizer(tuple(facts))
    made = Model(make_model("llama").module, tokenizer)
    keys, placebo = emphasis.chosen_words(made, facts, seed=0, alpha=0.0)
    for fact, *chosen in zip(facts, keys, placebo, strict=True):
        assert not any(fact.prompt.split()[i] == fact.answer for some in chosen for i in some)
    ds = emphasis.measure(made, facts, original=made)
    here = ds["score"].isel(candidate=0).notnull()
    # what is said again would say the answer again
    assert here.sel(fact="1").values.tolist() == [n not in {"attention", "repeated"} for n in TEMPLATES]
    assert here.sel(fact="2").values.tolist() == [n != "attention" for n in TEMPLATES]
    assert (ds["greedy_emphasised"].notnull() == here.drop_vars("candidate")).all()


def test_where_no_word_supports_the_answer_the_strongest_is_stressed():
    made = handmade(lookup_facts(4, 2, 4))
    control = of_split(made.facts, "control")  # nobody was taught: every contribution is 0
    keys, placebo = emphasis.chosen_words(made.original, control, seed=0)
    assert keys == [[0]] * 4
    assert all(len(some) == 1 and some != [0] for some in placebo)


def test_a_fact_whose_words_all_give_the_answer_away_is_not_asked(make_model, asked, monkeypatch):
    model = make_model()
    monkeypatch.setattr(emphasis, "leaks", lambda _text, _prompt, _answer: True)
    ds = emphasis.measure(model, asked, original=model)
    assert set(ds["keys"].values) == {""}
    assert ds["score"].isnull().all()
    assert ds["plain_score"].notnull().any()


def test_bad_input_is_told_in_one_line(make_model, asked):
    model = make_model()
    with pytest.raises(InputError, match="unknown template 'bold'; use quoted, attention"):
        emphasis.measure(model, asked, original=model, templates=("quoted", "bold"))
    with pytest.raises(InputError, match="unknown template 'none'"):
        emphasis.measure(model, asked, original=model, templates=())


def test_it_is_a_channel_whose_measurements_can_be_kept_and_weighed(tmp_path):
    made = handmade(lookup_facts(12, 4, 8))
    models = {"original": made.original, "unlearned": made.unlearned, "reference-0": made.never_taught}
    bench = Bench(models, made.facts, "quick", 0, Store(tmp_path))
    measured = {role: bench.measure(Cell(CHANNEL, role)) for role in models}
    back = measurement.open_(tmp_path / "emphasise.original.nc")
    xr.testing.assert_equal(back, measured["original"])
    assert {"score", "null_score", "placebo_score"} <= set(back)
    found = residue(measured)
    assert found.testable
    assert set(found.null) == {"reference", "control", "own"}
    assert found.residue.estimate == pytest.approx(0, abs=0.02)  # block 3 takes the answer off under any wording
    whole = residue({**measured, "unlearned": measured["original"]})
    assert whole.residue.estimate == pytest.approx(1)


def flags(values):
    return xr.DataArray(np.array(values, dtype=float), {"fact": range(len(values))}, "fact")


def test_the_rates_on_paper():
    nan = float("nan")
    known, said = flags([1, 1, 1, 1, 0, 1, 1]), flags([0, 0, 0, 0, 0, 1, 0])
    attacked, placebo = flags([1, 1, 0, 1, 1, 1, nan]), flags([0, 1, 0, nan, 0, 0, 0])
    alone = recovery_rate(known, said, attacked)
    assert alone.estimate == pytest.approx(3 / 4)
    held = recovery_rate(known, said, attacked, placebo)
    assert held.estimate == pytest.approx(1 / 3)
    want = stats.beta.ppf([0.025, 0.975], [1, 2], [3, 2])  # Clopper-Pearson for 1 of 3
    assert (held.low, held.high) == pytest.approx(tuple(want))
    broken = emphasis.destruction_rate(flags([1, 1, 0, 1, nan]), flags([0, 1, 0, nan, 0]))
    assert broken.estimate == pytest.approx(1 / 2)
    assert np.isnan(recovery_rate(known, known, attacked).estimate)


def test_what_only_a_suppressed_model_says_under_emphasis_is_recovered_in_it_alone(make_model, asked):
    model, silent = make_model(), make_model(seed=1)
    whole, other = (emphasis.measure(m, asked, original=model, templates=("starred",)) for m in (model, silent))
    known = xr.ones_like(whole["greedy"])
    attacked = other["greedy_emphasised"].max("place")
    rate = recovery_rate(known, other["greedy"], attacked, other["greedy_placebo"].max("place"))
    by_hand = [
        (a == 1 and p == 0)
        for s, a, p in zip(
            other["greedy"].values, attacked.values, other["greedy_placebo"].max("place").values, strict=True
        )
        if s == 0 and not np.isnan(a) and not np.isnan(p)
    ]
    assert rate.estimate == pytest.approx(np.mean(by_hand))
