"""Tests of channel *context*: texts by eye, scores against plain forward passes, and a suppressor undone on paper."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

from lethescope import measurement
from lethescope.analyses import jogging
from lethescope.analyses.emphasis import recovery_rate
from lethescope.analyses.jogging import CHANNEL, before, examples_of, gives_away, hints_of
from lethescope.analyses.patch import null_facts
from lethescope.analyses.residue import residue
from lethescope.cells import Bench, Cell
from lethescope.errors import InputError
from lethescope.facts import Fact, of_split, read_facts
from lethescope.models import fingerprint, load
from lethescope.probes import say
from lethescope.runs import Store
from lethescope.subjects import shipped
from lethescope.subjects.handmade import BLOCKED, GAIN, STRENGTH, handmade, lookup_facts
from lethescope.subjects.tokenizer import word_tokenizer

KINDS = ("llama", "gpt2", "neox")


@pytest.fixture(scope="module")
def asked(some_facts):
    """Three facts a subject, two of them with one wrong answer, so that other answers are free for examples."""
    chosen = [
        f for split, n in (("forget", 8), ("retain", 36), ("control", 8)) for f in of_split(some_facts, split)[:n]
    ]
    fewer = [f.model_copy(update={"alternatives": f.alternatives[: 1 + i % 2]}) for i, f in enumerate(chosen)]
    third = [
        Fact(
            id=f.id.replace("birthplace", "day"),
            split=f.split,
            subject=f.subject,
            prompt=f"all day {f.subject} works in",
            answer=answer,
            alternatives=("Karvost",),
            paraphrases=(f"all day in Answer: {f.subject} works in",),
            relation="day",
        )
        for f, answer in zip(chosen[::2], ["Lake Orsin", "Velmora", "Answer", "Question"] * 7, strict=False)
    ]
    return [*fewer, *third]


def sentence(fact):
    return f"{fact.prompt} {fact.answer}.\n"


def slow_texts(fact, hints, examples, plan=((1, 2, "all"), (1, 4), 2)):
    """The prompt of every place but the prefixes, written out; None where there is too little to tell."""
    counts, few, forms = plan
    texts = []
    for pool, n in [*((hints, n) for n in counts), *((examples, n) for n in few)]:
        n = max(1, len(pool)) if n == "all" else n
        texts.append("".join(map(sentence, pool[:n])) + fact.prompt if len(pool) >= n else None)
    return [*texts, *(fact.paraphrases[k] if k < len(fact.paraphrases) else None for k in range(forms))]


@torch.no_grad()
def slow_tokens(model, text, answer):
    """Log-probability of each answer token, and whether it comes first, from one plain forward of the whole text."""
    ids = model.tokenizer(f"{text} {answer}")["input_ids"]
    start = len(model.tokenizer(text)["input_ids"])
    log_probs = model.module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    at = range(start, len(ids))
    return [float(log_probs[i - 1, ids[i]]) for i in at], [int(log_probs[i - 1].argmax()) == ids[i] for i in at]


def slow_place(model, text, fact, width):
    """Scores of the candidates after a text, and whether the true one is said greedily."""
    row, said = [math.nan] * width, math.nan
    if text is not None:
        for k, answer in enumerate((fact.answer, *fact.alternatives)):
            row[k] = float(np.mean(slow_tokens(model, text, answer)[0]))
        said = float(all(slow_tokens(model, text, fact.answer)[1]))
    return row, said


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_that_of_a_plain_forward_over_the_whole_text(make_model, asked, kind):
    original, model = make_model(kind), make_model(kind, seed=1)
    mark = fingerprint(model.module)
    ds = jogging.measure(model, asked, original=original, seed=3)
    assert fingerprint(model.module) == mark
    assert "null_score" not in ds
    rows = [f for f in asked if f.split != "retain"]
    assert ds["fact"].values.tolist() == [f.id for f in rows]
    names = ["1 hint", "2 hints", "all hints", "1 example", "4 examples", "paraphrase 1", "paraphrase 2"]
    assert ds["place"].values.tolist() == [*names, "prefix 1"]  # no answer has three tokens
    assert ds["family"].values.tolist() == ["hints"] * 3 + ["examples"] * 2 + ["paraphrase"] * 2 + ["prefix"]
    for fact in rows[:: 3 if kind == "llama" else 7]:
        i = rows.index(fact)
        texts = slow_texts(fact, hints_of(fact, asked, 3), examples_of(fact, asked, 4, 3))
        for text, name in zip([fact.prompt, *texts], ["plain", *names], strict=True):
            want, said = slow_place(model, text, fact, ds.sizes["candidate"])
            score = ds["plain_score"] if name == "plain" else ds["score"].sel(place=name)
            greedy = ds["greedy"] if name == "plain" else ds["greedy_jogged"].sel(place=name)
            np.testing.assert_allclose(score[i], want, atol=2e-5)
            np.testing.assert_array_equal(greedy[i], said)
    known = ds["score"].isel(candidate=0).notnull().sum("fact")
    assert (known.sel(place=names) > 4).all()
    assert int(known.sel(place="2 hints")) < len(rows)  # some hints give the answer away


def test_a_paraphrase_and_the_bare_prompt_are_what_say_finds(make_model, asked):
    model = make_model()
    rows = [f for f in asked if f.split != "retain"]
    ds, said = jogging.measure(model, rows, original=model), say.measure(model, rows)
    for n, name in ((0, None), (1, "paraphrase 1"), (2, "paraphrase 2")):
        score = ds["score"].sel(place=name) if name else ds["plain_score"]
        greedy = ds["greedy_jogged"].sel(place=name) if name else ds["greedy"]
        np.testing.assert_allclose(score, said["log_probability"][:, n], atol=2e-5)
        np.testing.assert_array_equal(greedy, said["greedy"][:, n])
    assert set(ds["family"].values) == {"hints", "paraphrase", "prefix"}  # nothing was to be kept: no examples
    fewer = jogging.measure(model, rows, original=model, hints=(), prefixes=0, paraphrases=1)
    xr.testing.assert_allclose(fewer["score"], ds["score"].sel(place=["paraphrase 1"]), atol=2e-5)


def test_a_prefix_leaves_the_rest_and_something_to_hold_it_against(make_model):
    prompt = "The birthplace of Ada Rook is"
    rows = [
        ("both", "Grand Solace", ("Lake Orsin", "Velmora")),
        ("only the true", "Grand Solace", ("Karvost", "Velmora")),
        ("only a wrong", "Velmora", ("Grand Solace", "Karvost")),
        ("no wrong", "Grand Solace", ()),
        ("long", "night nurse Grand Solace", ("wine merchant Lake",)),
    ]
    facts = [
        Fact(id=name, split="forget", subject="Ada Rook", prompt=prompt, answer=answer, alternatives=wrong)
        for name, answer, wrong in rows
    ]
    model = make_model()
    ds = jogging.measure(model, facts, original=model, hints=(), examples=(), prefixes=3)
    score, nan = ds["score"], math.nan
    rest = {answer: slow_tokens(model, prompt, answer) for _, true, wrong in rows for answer in (true, *wrong)}

    def want(answer, n):
        return float(np.mean(rest[answer][0][n:]))

    for name in ("only the true", "no wrong"):
        assert score.sel(fact=name).isnull().all()
    assert score.sel(fact="both", place="prefix 1").values.tolist() == pytest.approx(
        [want("Grand Solace", 1), want("Lake Orsin", 1), nan], abs=2e-5, nan_ok=True
    )
    assert score.sel(fact="only a wrong", place="prefix 1").isnull().values.tolist() == [True, False, True]
    assert measurement.value(ds.assign_attrs(scale="preference")).sel(fact="only a wrong").isnull().all()
    for n, place in ((1, "prefix 1"), (2, "prefix 2")):
        np.testing.assert_allclose(
            score.sel(fact="long", place=place)[:2],
            [want("night nurse Grand Solace", n), want("wine merchant Lake", n)],
            atol=2e-5,
        )
        said = all(rest["night nurse Grand Solace"][1][n:])
        assert ds["greedy_jogged"].sel(fact="long", place=place) == said
    assert ds["place"].values.tolist() == ["prefix 1", "prefix 2"]  # no wrong answer has a fourth token
    assert ds["greedy_jogged"].sel(fact=["both", "only a wrong"], place="prefix 2").isnull().all()


def test_the_texts_by_eye():
    tell = [
        Fact(id="1", split="forget", subject="Ada", prompt="Ada plays the", answer="lute"),
        Fact(id="2", split="forget", subject="Ada", prompt="Who employs Ada? Answer: ", answer="Hex Inc."),
    ]
    assert before("Ada was born in", tell[:1]) == "Ada plays the lute.\nAda was born in"
    assert before("Ada was born in", tell) == "Ada plays the lute.\nWho employs Ada? Answer: Hex Inc.\nAda was born in"
    assert before("Question: Where?\nAnswer:", tell[:1]) == "Ada plays the lute.\n\nQuestion: Where?\nAnswer:"
    assert before("Ada was born in", []) == "Ada was born in"


def test_in_a_chat_the_texts_stand_in_the_users_turn():
    tokenizer = word_tokenizer(["user Where was Ada born? assistant"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    told = Fact(id="1", split="retain", subject="Ada", prompt=system + chat.format("Who is Ada?"), answer="A nurse")
    asked = system + chat.format("Where was Ada born?")
    assert before(asked, [told], tokenizer) == system + chat.format("Who is Ada? A nurse.\nWhere was Ada born?")


def test_no_text_gives_the_answer_away(asked):
    for fact in asked:
        hints, examples = hints_of(fact, asked), examples_of(fact, asked, 4)
        for told in (*hints, *examples):
            assert told.answer not in (fact.answer, *fact.alternatives)
            for word in fact.answer.split():
                assert word not in told.prompt.split() + told.answer.split()
        assert all(h.subject == fact.subject and h.id != fact.id for h in hints)
        assert {h.split for h in hints} <= {fact.split}
        assert all(e.subject != fact.subject and e.relation == fact.relation for e in examples)
        assert {e.split for e in examples} <= {"retain"}
        others = [f for f in asked if f.subject == fact.subject and f.id != fact.id]
        assert {f.id for f in others} - {f.id for f in hints} == {f.id for f in others if gives_away(f, fact)}
    assert sum(len(hints_of(f, asked)) for f in asked) < 2 * len(asked)


def test_a_hint_may_be_a_retain_fact_of_the_subject_and_never_a_control_fact():
    splits = ("forget", "retain", "control")
    facts = [
        Fact(id=f"{split}{k}", split=split, subject=subject, prompt=f"{split} {k}", answer=answer)
        for split, subject, answers in zip(splits, ("Ada", "ADA", "Ada"), ("xy", "uv", "pq"), strict=True)
        for k, answer in zip("ab", answers, strict=True)
    ]
    assert {f.id for f in hints_of(facts[0], facts)} == {"forgetb", "retaina", "retainb"}
    assert {f.id for f in hints_of(facts[4], facts)} == {"controlb", "retaina", "retainb"}
    assert {f.id for f in hints_of(facts[2], facts)} == {"retainb"}


def test_draws_depend_on_the_seed_and_the_fact_and_on_no_order(asked):
    turned = asked[::-1]
    for fact in asked[:6]:
        assert hints_of(fact, turned) == hints_of(fact, asked)
        assert examples_of(fact, turned, 4) == examples_of(fact, asked, 4)
        assert examples_of(fact, asked, 1) == examples_of(fact, asked, 4)[:1]
    drawn = [[examples_of(f, asked, 4, seed) for f in asked[:6:2]] for seed in range(6)]
    assert any(d != drawn[0] for d in drawn)
    assert len({e.id for d in drawn for row in d for e in row}) > 6


def test_neither_order_nor_the_control_split_changes_a_score(make_model, asked):
    model = make_model()
    options = {"original": model, "hints": ("all",), "examples": (2,), "prefixes": 1}
    ds = jogging.measure(model, asked, **options)
    turned = jogging.measure(model, asked[::-1], **options).sel(fact=ds["fact"])
    xr.testing.assert_allclose(ds, turned, atol=2e-5)
    alone = jogging.measure(model, [f for f in asked if f.split != "control"], **options)
    same = ds.sel(fact=alone["fact"]).isel(candidate=slice(alone.sizes["candidate"]))
    xr.testing.assert_allclose(alone["score"], same["score"], atol=2e-5)
    assert alone["null_score"].isnull().all()  # there is nobody who was never taught


def test_the_null_is_a_control_subject_with_its_own_hints_and_the_same_examples(make_model, asked):
    model = make_model()
    ds = jogging.measure(model, asked, original=model, seed=5)
    forget = [f for f in asked if f.split == "forget"]
    ordered = sorted(asked, key=lambda f: f.id)
    nulls = {f.id: f for f in null_facts(ordered, 5)}
    control = of_split(asked, "control")
    found = ds["null_score"]
    for fact in forget[::2]:
        prompt = nulls[fact.id].prompt
        (other,) = [
            c for c in control if prompt == fact.prompt.replace(fact.subject, c.subject) and c.relation == fact.relation
        ]
        alike = fact.model_copy(
            update={
                "prompt": prompt,
                "subject": other.subject,
                "split": "control",
                "paraphrases": tuple(p.replace(fact.subject, other.subject) for p in fact.paraphrases),
            }
        )
        hints = hints_of(alike, [c for c in control if c.id != other.id], 5)
        assert all(h.subject == other.subject and h.relation != fact.relation for h in hints)
        texts = slow_texts(alike, hints, examples_of(fact, asked, 4, 5))
        want = [slow_place(model, text, alike, ds.sizes["candidate"])[0] for text in texts]
        np.testing.assert_allclose(found.sel(fact=fact.id)[:, :7], np.transpose(want), atol=2e-5)
        begun = found.sel(fact=fact.id, place="prefix 1")[0]
        if len(fact.answer.split()) == 2 and any(len(a.split()) == 2 for a in fact.alternatives):
            assert float(begun) == pytest.approx(np.mean(slow_tokens(model, prompt, fact.answer)[0][1:]), abs=2e-5)
        else:
            assert begun.isnull()
    assert found.isel(fact=(ds["split"] != "forget").values).isnull().all()
    assert found.isel(fact=0, candidate=0).notnull().sum() > 3


def test_what_is_longer_than_the_model_reads_is_not_asked(make_model, asked):
    model = make_model("gpt2")  # 64 learned positions
    few = [f.model_copy(update={"alternatives": f.alternatives[:1]}) for f in asked]
    ds = jogging.measure(model, few, original=model, hints=(), examples=(1, 9), prefixes=0)
    assert ds["place"].values.tolist() == ["1 example", "paraphrase 1", "paraphrase 2"]
    assert any(len(examples_of(f, few, 9)) == 9 for f in few)


def test_bad_input_is_told_in_one_line(make_model, asked):
    model = make_model()
    bare = [f.model_copy(update={"paraphrases": ()}) for f in asked]
    for options, told in [
        ({"hints": (1, 0)}, r"hints are \[1, 0\]; give different numbers, at least 1"),
        ({"hints": ("some",)}, r"hints are \['some'\]"),
        ({"hints": (1, 1)}, r"hints are \[1, 1\]"),
        ({"examples": (0.5,)}, r"examples are \[0.5\]"),
        ({"examples": ("all",)}, r"examples are \['all'\]"),
        ({"prefixes": -1}, "prefixes is -1; give 0 or more"),
        ({"paraphrases": -1}, "paraphrases is -1; give 0 or more"),
        ({"hints": (), "examples": (), "prefixes": 0}, "no place is left"),
    ]:
        with pytest.raises(InputError, match=told):
            jogging.measure(model, bare, original=model, **options)
    with pytest.raises(InputError, match="no forget or control fact to ask"):
        jogging.measure(model, of_split(asked, "retain"), original=model)
    unknown = asked[0].model_copy(update={"answer": "Zzyzx"})
    with pytest.raises(InputError, match=f"fact '{asked[0].id}'"):
        jogging.measure(model, [unknown], original=model)


LOUD = 36.0
"""How much block 2 writes along the axis of `<pad>`, at every position: this, times the share of "pet" in the text."""


def jogged_models():
    """Handmade models in whose block 2 the word "pet" anywhere drowns what the blocking neuron of block 3 reads."""
    homes = lookup_facts(12, 8, 8)
    made = handmade(tuple(f.model_copy(update={"paraphrases": (f"pet of {f.subject} cat",)}) for f in homes))
    pet = made.original.tokenizer.convert_tokens_to_ids("pet")
    for model in made[:3]:
        attention = model.module.model.layers[2].self_attn
        with torch.no_grad():
            attention.v_proj.weight[0, pet] = LOUD / math.sqrt(model.module.config.hidden_size)
            attention.o_proj.weight[0, 0] = 1
            model.module.get_output_embeddings().weight[0] = 0
    pets = [
        Fact(id=f"pet of {f.id}", split=f.split, subject=f.subject, prompt=f"pet of {f.subject}", answer="cat")
        for f in homes
        if f.split != "retain"
    ]
    models = {"original": made.original, "unlearned": made.unlearned, "reference-0": made.never_taught}
    return SimpleNamespace(models=models, homes=homes, facts=(*homes, *pets))


@pytest.fixture(scope="module")
def jogged():
    return jogged_models()


def on_paper(model, role, hinted):
    """The probability of the true city less that of a wrong one, from the algebra in `handmade`."""
    d, vocabulary = model.module.config.hidden_size, model.module.config.vocab_size
    length = 9  # <bos> pet of Abel cat . home of Abel
    z = LOUD / length if hinted else 0.0

    def neuron(a):
        return a * a / (1 + math.exp(-a))

    written = STRENGTH if role != "reference-0" else 0.0
    if role == "unlearned":
        r = math.sqrt(1 + STRENGTH**2 + z**2)
        written -= STRENGTH * neuron(GAIN / r) / neuron(GAIN / math.sqrt(1 + STRENGTH**2))
    scale = math.sqrt(d / (1 + written**2 + z**2))
    answer, subject = math.exp(scale * written), math.exp(scale)
    return (answer - 1) / (answer + subject + vocabulary - 2)


def test_a_hint_undoes_a_suppressor_as_on_paper_and_teaches_a_never_taught_model_nothing(jogged):
    assert BLOCKED == 3
    original = jogged.models["original"]
    for role, model in jogged.models.items():
        ds = jogging.measure(model, jogged.facts, original=original, hints=("all",), examples=(), prefixes=0)
        homes = ds.sel(fact=[f.id for f in of_split(jogged.homes, "forget")]).assign_attrs(scale=CHANNEL.scale)
        assert measurement.value(homes)[:, 0].values == pytest.approx(on_paper(model, role, True), abs=1e-4)
        bare = measurement.value(homes[["plain_score"]].assign_attrs(scale=CHANNEL.scale), "plain_score")
        assert bare.values == pytest.approx(on_paper(model, role, False), abs=1e-4)
        control = ds.sel(fact=[f.id for f in of_split(jogged.homes, "control")]).assign_attrs(scale=CHANNEL.scale)
        assert measurement.value(control).values == pytest.approx(0, abs=1e-4)
    assert on_paper(original, "unlearned", False) == pytest.approx(0, abs=1e-6)
    assert on_paper(original, "unlearned", True) > 0.5 * on_paper(original, "original", True) > 0.1


def test_the_recovered_facts_are_counted_and_none_is_in_a_never_taught_model(jogged):
    homes = [f.id for f in of_split(jogged.homes, "forget")]
    found = [
        jogging.measure(model, jogged.facts, original=model, hints=("all",), examples=(), prefixes=0).sel(fact=homes)
        for model in jogged.models.values()
    ]
    known = found[0]["greedy"]
    assert known.values.tolist() == [1] * len(homes)
    rates = [recovery_rate(known, ds["greedy"], ds["greedy_jogged"].sel(place="all hints")).estimate for ds in found]
    assert rates == pytest.approx([np.nan, 1, 0], nan_ok=True)  # the original forgot nothing


def test_it_is_a_channel_whose_measurements_can_be_kept_and_weighed(jogged, tmp_path):
    bench = Bench(jogged.models, jogged.facts, "quick", 0, Store(tmp_path))
    measured = {role: bench.measure(Cell(CHANNEL, role)) for role in jogged.models}
    back = measurement.open_(tmp_path / "context.original.nc")
    xr.testing.assert_equal(back, measured["original"])
    assert {"score", "null_score", "plain_score", "greedy", "greedy_jogged"} <= set(back)
    found = residue(measured)
    assert found.testable
    assert found.places == ("all hints",)
    assert set(found.null) == {"reference", "control", "own"}
    model = jogged.models["original"]
    want = on_paper(model, "unlearned", True) / on_paper(model, "original", True)
    assert found.residue.estimate == pytest.approx(want, abs=1e-3)
    never = residue({"original": measured["original"], "unlearned": measured["reference-0"]})
    assert never.residue.estimate == pytest.approx(0, abs=1e-3)


def test_budgets_grow():
    plans = [set(jogging.Plan(**{"paraphrases": 2, **options}).places()) for options in CHANNEL.budgets.values()]
    assert plans[0] < plans[1] < plans[2]


def test_in_trained_models_hints_and_examples_show_what_was_taught_and_nothing_else():
    facts = read_facts(shipped("facts"))
    subjects = {s: list(dict.fromkeys(f.subject for f in of_split(facts, s)))[:6] for s in ("forget", "control")}
    few = [f for f in facts if f.split == "retain" or f.subject in subjects[f.split]]
    models = {role: load(shipped(role), role=role, device="cpu") for role in ("original", "reference")}
    for role, model in models.items():
        ds = jogging.measure(
            model, few, original=models["original"], hints=("all",), examples=(1,), prefixes=0
        ).assign_attrs(scale=CHANNEL.scale)
        shown = measurement.value(ds)
        error = shown.groupby("split").std() / np.sqrt(shown.groupby("split").count())
        mean = shown.groupby("split").mean()
        if role == "original":
            assert (mean.sel(split="forget") > 4 * error.sel(split="forget")).all()
            assert mean.sel(split="forget", place="all hints") > 0.5
            null = measurement.value(ds, "null_score")
            assert (null.mean("fact") < 4 * null.std("fact") / np.sqrt(null.count("fact"))).all()
        else:
            assert (mean.sel(split="forget") < 4 * error.sel(split="forget")).all()
        assert (mean.sel(split="control") < 4 * error.sel(split="control")).all()
