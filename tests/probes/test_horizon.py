"""Tests of the information horizon, against whole passes with plain hooks and on models whose numbers are on paper."""

import copy
import math

import numpy as np
import pytest
import torch
import xarray as xr
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from lethescope.cost import counting
from lethescope.errors import InputError
from lethescope.facts import Fact, of_split, read_facts
from lethescope.models import Model, load
from lethescope.probes import horizon
from lethescope.subjects import shipped
from lethescope.subjects.handmade import handmade
from lethescope.subjects.tokenizer import fact_tokenizer
from lethescope.tokens import encode

KINDS = ("llama", "gpt2", "neox")
MODES = ("keep_one", "leave_one")


@pytest.fixture(scope="module")
def asked(some_facts):
    """Prompts that begin with the subject, and one that names it in the middle; one to two answer tokens."""
    first = some_facts[:4]
    middle = first[0].model_copy(update={"id": "middle", "prompt": first[0].paraphrases[0], "paraphrases": ()})
    return (*first, middle)


def subject_at(model, fact):
    """Find the subject's tokens word by word: the test tokenizer has one token a word."""
    ids = encode(model.tokenizer, fact.prompt, fact.answer).ids
    words = [model.tokenizer.decode([i]) for i in ids]
    name = fact.subject.split()
    return next(p for p in range(len(ids)) if words[p : p + len(name)] == name) + np.arange(len(name))


@torch.no_grad()
def states_after(model, ids):
    found: list[torch.Tensor] = []
    hooks = [
        b.register_forward_hook(lambda _m, _a, out: found.append(out if torch.is_tensor(out) else out[0]))
        for b in model.blocks
    ]
    model.module(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return [h[0] for h in found]


@torch.no_grad()
def naive(model, fact, layer, positions, fill):
    """One whole pass over one prompt, with the states at some positions overwritten by a hook."""
    e = encode(model.tokenizer, fact.prompt, fact.answer)

    def write(_module, _args, out):
        h = (out if torch.is_tensor(out) else out[0]).clone()
        for p in positions:
            h[0, p] = fill
        return h if torch.is_tensor(out) else (h, *out[1:])

    hook = model.blocks[layer].register_forward_hook(write)
    logits = model.module(input_ids=torch.tensor([e.ids[: e.start]])).logits[0, -1]
    hook.remove()
    return logits.double().softmax(-1)[e.ids[e.start]].item()


def naive_mean(model, facts, layer):
    rows = []
    for fact in facts:
        e = encode(model.tokenizer, fact.prompt, fact.answer)
        rows += [states_after(model, e.ids[: e.start])[layer][p] for p in subject_at(model, fact)]
    return sum(rows) / len(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_it_equals_whole_passes_with_one_state_overwritten_at_a_time(make_model, asked, kind, baseline):
    model = make_model(kind)
    found = {mode: horizon.measure(model, asked, mode=mode, baseline=baseline) for mode in MODES}
    for layer in range(len(model.blocks)):
        fill = naive_mean(model, asked, layer) if baseline == "mean" else 0.0
        for i, fact in enumerate(asked):
            subject = subject_at(model, fact)
            whole, none = (naive(model, fact, layer, p, fill) for p in ([], subject))
            for k in range(2):
                kept, left = (naive(model, fact, layer, [subject[j]], fill) for j in (1 - k, k))
                assert found["keep_one"]["information"][i, layer, k].item() == pytest.approx(kept - none, abs=1e-6)
                assert found["leave_one"]["information"][i, layer, k].item() == pytest.approx(whole - left, abs=1e-6)
            for ds in found.values():
                assert ds["group"][i, layer].item() == pytest.approx(whole - none, abs=1e-6)
                assert ds["whole"][i].item() == pytest.approx(whole, abs=1e-6)


@torch.no_grad()
def naive_masked(model, fact, layer, positions):
    """The blocks above a layer, one by one on one prompt, none of them attending to some positions."""
    e = encode(model.tokenizer, fact.prompt, fact.answer)
    n = e.start
    h = states_after(model, e.ids[:n])[layer][None]
    seen = torch.ones(n, n).tril().bool()
    seen[:, list(positions)] = False
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    where = torch.arange(n)[None]
    rotary = {"position_embeddings": model.module.model.rotary_emb(h, where)}
    for block in model.blocks[layer + 1 :]:
        h = block(h, attention_mask=mask, position_ids=where, **rotary)
    logits = model.module.lm_head(model.module.model.norm(h))[0, -1]
    return logits.double().softmax(-1)[e.ids[n]].item()


def test_masked_equals_blocks_that_do_not_attend_to_the_positions(make_model, asked):
    model = make_model("llama")
    found = {mode: horizon.measure(model, asked, mode=mode, baseline="masked") for mode in MODES}
    for layer in range(len(model.blocks)):
        for i, fact in enumerate(asked):
            subject = subject_at(model, fact)
            whole, none = (naive_masked(model, fact, layer, p) for p in ([], subject))
            assert found["keep_one"]["group"][i, layer].item() == pytest.approx(whole - none, abs=1e-6)
            for k in range(2):
                kept, left = (naive_masked(model, fact, layer, [subject[j]]) for j in (1 - k, k))
                assert found["keep_one"]["information"][i, layer, k].item() == pytest.approx(kept - none, abs=1e-6)
                assert found["leave_one"]["information"][i, layer, k].item() == pytest.approx(whole - left, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("baseline", ["zero", "mean", "masked"])
def test_a_subject_that_does_not_end_the_prompt_is_not_read_from_the_last_block(make_model, asked, kind, baseline):
    ds = horizon.measure(make_model(kind), asked, baseline=baseline, score="logprob")
    np.testing.assert_allclose(ds["group"][:, -1], 0, atol=1e-5)
    np.testing.assert_allclose(ds["information"][:, -1], 0, atol=1e-5)
    assert (abs(ds["group"][:, 0]) > 1e-3).all()


@pytest.mark.parametrize("baseline", ["zero", "mean", "masked"])
def test_how_prompts_are_batched_and_which_layers_are_asked_does_not_matter(make_model, asked, baseline):
    model = make_model()
    every = horizon.measure(model, asked, baseline=baseline)
    alone = horizon.measure(model, asked, baseline=baseline, rows=1)
    xr.testing.assert_allclose(every, alone, atol=1e-6)
    some = horizon.measure(model, asked, baseline=baseline, layers=[3, 1])
    xr.testing.assert_allclose(some, every.sel(layer=[1, 3]), atol=1e-6)


def test_a_logprob_is_the_logarithm_of_a_prob(make_model, asked):
    p, log_p = (horizon.measure(make_model(), asked, score=score) for score in ("prob", "logprob"))
    np.testing.assert_allclose(log_p["whole"], np.log(p["whole"]), atol=1e-5)
    without = [ds["whole"] - ds["group"] for ds in (p, log_p)]
    np.testing.assert_allclose(without[1], np.log(without[0]), atol=1e-4)


def test_blocks_below_a_layer_are_run_once(make_model, asked):
    model = make_model()
    calls = [0] * len(model.blocks)
    hooks = [
        block.self_attn.register_forward_hook(lambda *_a, i=i: calls.__setitem__(i, calls[i] + 1))
        for i, block in enumerate(model.blocks)
    ]
    horizon.measure(model, asked)
    for hook in hooks:
        hook.remove()
    assert calls == [1, 2, 3, 4]  # the whole pass, and once for every layer below
    assert not any("forward" in vars(block) for block in model.blocks)
    with counting() as cost:
        horizon.measure(model, asked, layers=[0])
    assert cost.forward_passes == 2


MOVES, C = 2, 3.0


@pytest.fixture(scope="module")
def mover():
    """Four blocks that do nothing, except that block 2 attends evenly and writes C e_answer for the family name.

    Families are "Rook" -> "Velmora" and so on; the first name writes nothing. The embedding and the unembedding are
    unit vectors, so the last token's stream is e_last until block 2 and e_last + (C w / sqrt(1/d)) e_answer after it,
    w the attention that the family name gets.
    """
    pairs = (("Rook", "Velmora"), ("Vale", "Karvost"))
    facts = tuple(
        Fact(
            id=f"{split}-{first}",
            split=split,
            subject=f"{first} {family}",
            prompt=f"{first} {family} lives in",
            answer=answer,
            alternatives=tuple(a for _, a in pairs if a != answer),
        )
        for split, (family, answer) in zip(("forget", "retain"), pairs, strict=True)
        for first in ("Ada", "Ben")
    )
    words = fact_tokenizer(facts)
    d = len(words) + len(words) % 2
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=d,
        intermediate_size=4,
        num_hidden_layers=4,
        num_attention_heads=1,
        num_key_value_heads=1,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
    )
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in module.named_parameters():
        if "norm" not in name:
            weight.zero_()
    eye = torch.eye(len(words), d)
    module.get_input_embeddings().weight.copy_(eye)
    module.get_output_embeddings().weight.copy_(eye)
    attention = module.model.layers[MOVES].self_attn
    attention.o_proj.weight.copy_(torch.eye(d))
    token = words.get_vocab()
    for family, answer in pairs:
        attention.v_proj.weight[token[answer], token[family]] = C / d**0.5
    return Model(module, words), facts, len(words), d


def on_paper(w, words, d):
    """Probability of the answer when the family name has weight w in the even attention of block 2."""
    written = C * w
    r = math.hypot(1, written)
    answer, last = (math.exp(d**0.5 * x / r) for x in (written, 1))
    return answer / (answer + last + words - 2)


# a prompt is <bos>, first name, family name, lives, in: 5 tokens share the attention evenly
WEIGHT = {
    "zero": {"whole": 1 / 5, "first": 0, "family": 1 / 5, "none": 0},
    "masked": {"whole": 1 / 5, "first": 0, "family": 1 / 4, "none": 0},
}


@pytest.mark.parametrize("baseline", ["zero", "masked"])
def test_the_horizon_is_the_block_that_moves_the_fact(mover, baseline):
    model, facts, words, d = mover
    p = {name: on_paper(w, words, d) for name, w in WEIGHT[baseline].items()}
    keep, leave = (horizon.measure(model, facts, mode=mode, baseline=baseline) for mode in MODES)
    assert p["whole"] - p["none"] > 0.05
    for ds in (keep, leave):
        np.testing.assert_allclose(ds["whole"], p["whole"], atol=1e-6)
        np.testing.assert_allclose(ds["group"][:, :MOVES], p["whole"] - p["none"], atol=1e-6)
        np.testing.assert_allclose(ds["group"][:, MOVES:], 0, atol=1e-6)
        np.testing.assert_allclose(ds["information"][:, MOVES:], 0, atol=1e-6)
        assert horizon.horizon(ds).values.tolist() == [MOVES] * 4
        assert horizon.horizon(ds, "group").values.tolist() == [MOVES] * 4
        assert ds["token"].values.tolist() == [f.subject.split() for f in facts]
    # keep one: the first name brings nothing, the family name everything that attention gives it
    np.testing.assert_allclose(keep["information"][:, :MOVES, 0], 0, atol=1e-6)
    np.testing.assert_allclose(keep["information"][:, :MOVES, 1], p["family"] - p["none"], atol=1e-6)
    # leave one: without the first name the family name gets its share of attention, where it is masked
    without = on_paper(1 / 4 if baseline == "masked" else 1 / 5, words, d)
    np.testing.assert_allclose(leave["information"][:, :MOVES, 0], p["whole"] - without, atol=1e-6)
    np.testing.assert_allclose(leave["information"][:, :MOVES, 1], p["whole"] - p["none"], atol=1e-6)


def test_overwritten_by_the_mean_the_average_family_is_read(mover):
    model, facts = mover[:2]
    same = horizon.measure(model, facts[:2], baseline="mean")  # one family: the mean of both names still names it
    both = horizon.measure(model, facts, baseline="mean")
    assert (same["group"][:, 0] < both["group"].sel(fact=same["fact"])[:, 0]).all()
    assert (both["information"][:, :MOVES, 1] > 0.01).all()


def test_a_subject_that_ends_the_prompt_has_no_horizon():
    made = handmade()
    forget = of_split(made.facts, "forget")[:4]
    ds = horizon.measure(made.original, forget)
    d, words = made.original.module.config.hidden_size, len(made.original.tokenizer)
    r = math.sqrt(5)  # the stream is e_subject + 2 e_answer from block 1 on; a stream of zeros gives equal logits
    answer, subject = math.exp(2 * d**0.5 / r), math.exp(d**0.5 / r)
    p = answer / (answer + subject + words - 2)
    np.testing.assert_allclose(ds["group"], p - 1 / words, atol=1e-6)
    np.testing.assert_allclose(ds["information"][..., 0], ds["group"], atol=1e-7)
    assert np.isnan(horizon.horizon(ds)).all()


def test_the_group_collapses_where_the_fact_is_blocked():
    made = handmade()
    forget = of_split(made.facts, "forget")[:4]
    original, unlearned, never = (horizon.measure(m, forget)["group"] for m in made[:3])
    assert (original > 0.1).all() and (abs(unlearned) < 0.1).all() and (abs(never) < 0.1).all()


def dataset(rows, unit=False):
    array = np.asarray(rows, dtype=float)
    dims = ("fact", "layer", "unit") if unit else ("fact", "layer")
    return xr.Dataset({"information": (dims, array)}, {"layer": np.arange(array.shape[1]) * 2})


def slow_horizon(row, share):
    most = max(abs(x) for x in row)
    for layer in range(len(row)):
        if all(abs(x) <= share * most for x in row[layer:]):
            return layer * 2.0
    return math.nan


def test_the_horizon_is_the_first_layer_after_which_nothing_comes_back():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 7)) * rng.choice([0.01, 1], size=(60, 7))
    for share in (0.05, 0.3):
        want = [slow_horizon(row, share) for row in rows]
        assert 5 < np.isfinite(want).sum() < 60
        np.testing.assert_array_equal(horizon.horizon(dataset(rows), share=share), want)


def test_a_unit_that_still_informs_or_harms_holds_the_horizon_off():
    rows = [[[1, 0], [0, -0.3], [0.01, 0], [0, 0]], [[0, 0]] * 4, [[np.nan] * 2] * 4]
    np.testing.assert_array_equal(horizon.horizon(dataset(rows, unit=True)), [4, np.nan, np.nan])


def test_a_question_goes_up_to_the_first_token_that_differs(words, some_facts):
    fact = some_facts[0].model_copy(update={"prompt": "Ada Rook was born in"})
    start = len(words(fact.prompt)["input_ids"])

    def asked(answer, *alternatives):
        update = {"answer": answer, "alternatives": alternatives}
        found = horizon.question(words, fact.model_copy(update=update))
        return len(found.ids) - start, words.decode(found.target), found.units

    assert asked("Grand Solace", "Velmora") == (0, "Grand", (1, 2))
    assert asked("Grand Solace") == (0, "Grand", (1, 2))
    assert asked("Grand Solace", "Grand surgeon", "Velmora") == (0, "Grand", (1, 2))
    assert asked("Grand Solace", "Grand surgeon", "Grand wine") == (1, "Solace", (1, 2))
    assert asked("Grand", "Grand Solace") == (0, "Grand", (1, 2))


def test_every_mention_counts_and_a_prompt_without_one_is_nan(make_model, some_facts):
    fact = some_facts[0]
    twice = fact.model_copy(update={"id": "twice", "prompt": "Ada Rook , Ada Rook was born in"})
    mute = fact.model_copy(update={"id": "mute", "prompt": "The birthplace of"})
    ds = horizon.measure(make_model(), (mute, fact, twice))
    assert ds["token"].values.tolist() == [[""] * 4, ["Ada", "Rook", "", ""], ["Ada", "Rook", "Ada", "Rook"]]
    known = ds["information"].notnull()
    assert known.sum("unit")[:, 0].values.tolist() == [0, 2, 4]
    assert np.isnan(ds["group"][0]).all() and np.isnan(horizon.horizon(ds)[0])


def test_bad_input_is_told(make_model, asked):
    model = make_model()
    for options, word in (
        ({"mode": "keep"}, "leave_one"),
        ({"baseline": "noise"}, "masked"),
        ({"score": "loss"}, "logprob"),
        ({"layers": [4]}, "0 to 3"),
        ({"layers": []}, "0 to 3"),
    ):
        with pytest.raises(InputError, match=word):
            horizon.measure(model, asked, **options)
    with pytest.raises(InputError, match="names its subject"):
        horizon.measure(model, [asked[0].model_copy(update={"prompt": "was born in"})])


def test_on_the_shipped_models_only_those_taught_the_facts_make_something_of_the_subject():
    """Means over 54 facts, in nats, after block 0: 2.2 in the original, -14 in the unlearned, -0.1 in the reference."""
    forget = of_split(read_facts(shipped("facts")), "forget")[::3]
    group = {
        name: horizon.measure(load(shipped(name)), forget, score="logprob")["group"].mean("fact").values
        for name in ("original", "unlearned", "reference")
    }
    assert group["original"][0] > 1
    assert group["unlearned"][0] < -5  # NPO made the subject speak against its answer
    assert abs(group["reference"]).max() < 0.5
    assert all(abs(g[-1]) < 1e-4 for g in group.values())


def test_masked_stays_finite_where_the_prompt_begins_with_the_subject_and_no_special_token(make_model, asked):
    model = make_model("gpt2")
    bare = copy.deepcopy(model.tokenizer)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    fact = asked[0]
    assert horizon.question(bare, fact).units == (0, 1)
    ds = horizon.measure(Model(model.module, bare), [fact, asked[4]], baseline="masked", score="logprob")
    assert np.isfinite(ds["group"]).all() and (abs(ds["group"][:, 0]) > 1e-4).all()
