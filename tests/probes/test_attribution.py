"""Tests of prompt attribution: against one plain pass a unit, against captum, and on models known on paper."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, PreTrainedTokenizerFast

from lethescope.errors import InputError
from lethescope.facts import Fact, of_split
from lethescope.models import Model
from lethescope.probes import attribution
from lethescope.probes.attribution import key_units, measure
from lethescope.subjects.handmade import handmade
from lethescope.subjects.tokenizer import fact_tokenizer
from lethescope.tokens import encode

KINDS = ("llama", "gpt2", "neox")


@pytest.fixture(scope="module")
def asked(some_facts):
    """Statements and questions: prompts of 5 to 9 words, answers of one word and of two."""
    facts = of_split(some_facts, "forget")[:4]
    return [*facts, *(f.model_copy(update={"id": f"q-{f.id}", "prompt": f.paraphrases[1]}) for f in facts)]


@pytest.fixture(scope="module")
def subwords():
    """A byte-level BPE tokenizer without special tokens in front, in which words fall apart and stick together."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<|end|>"], initial_alphabet=letters)
    core.train_from_iterator(["The dog of the doctor is in the den", "where was the other born"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def subword_model(subwords):
    config = GPT2Config(vocab_size=len(subwords), n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(AutoModelForCausalLM.from_config(config).requires_grad_(False).eval(), subwords)


def fact(prompt, answer="Ardmere", subject="Ada Rook"):
    return Fact(id=prompt[:40], split="forget", subject=subject, prompt=prompt, answer=answer)


@torch.no_grad()
def plainly(model, ids, answer):
    """Mean log-probability of answer ids in one plain pass."""
    log_p = model.module(input_ids=torch.tensor([[*ids, *answer]])).logits[0].double().log_softmax(-1)
    return np.mean([log_p[len(ids) - 1 + k, token].item() for k, token in enumerate(answer)])


def prompt_ids(model, prompt, answer):
    """The tokens of a prompt that is followed by a space and an answer."""
    if not prompt:
        first = model.tokenizer.bos_token_id
        return [model.tokenizer.eos_token_id if first is None else first]
    coded = encode(model.tokenizer, prompt, answer)
    return coded.ids[: coded.start]


def kept_value(model, one, kept):
    """LP of a prompt of single-spaced words of which only some are kept."""
    said = encode(model.tokenizer, one.prompt, one.answer).answer
    text = " ".join(w for i, w in enumerate(one.prompt.split(" ")) if i in kept)
    return plainly(model, prompt_ids(model, text, one.answer), said)


def slow_leave_one_out(model, one):
    """One pass a word."""
    every = range(len(one.prompt.split(" ")))
    whole = kept_value(model, one, every)
    return whole, [whole - kept_value(model, one, set(every) - {i}) for i in every]


def row(ds, i=0):
    return ds["contribution"][i].dropna("unit").values


@pytest.mark.parametrize("kind", KINDS)
def test_leave_one_out_equals_one_plain_pass_a_word(make_model, asked, kind):
    model = make_model(kind)
    ds = measure(model, asked)
    assert ds["contribution"].dims == ("fact", "unit")
    for i, one in enumerate(asked):
        whole, want = slow_leave_one_out(model, one)
        assert ds["log_probability"][i].item() == pytest.approx(whole, abs=1e-5)
        np.testing.assert_allclose(row(ds, i), want, atol=1e-5)
        assert [t for t in ds["unit_text"][i].values if t] == one.prompt.split(" ")
    assert np.abs(ds["contribution"]).max() > 0.1


def test_it_holds_where_words_are_many_tokens_and_nothing_stands_in_front(subword_model):
    facts = [fact("The doctor of the other is in", "the den"), fact("where was the dog born", "dog"), fact("of", "den")]
    ds = measure(subword_model, facts)
    assert len(subword_model.tokenizer(facts[0].prompt)["input_ids"]) > len(facts[0].prompt.split())
    for i, one in enumerate(facts):
        np.testing.assert_allclose(row(ds, i), slow_leave_one_out(subword_model, one)[1], atol=1e-5)


def test_a_window_that_forgets_keys_is_not_shared():
    tokenizer = fact_tokenizer((fact("a b c d e f g h i j k l Ada Rook was born in"),))
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        sliding_window=4,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(AutoModelForCausalLM.from_config(config).requires_grad_(False).eval(), tokenizer)
    one = fact("a b c d e f g h i j k l Ada Rook was born in")
    np.testing.assert_allclose(row(measure(model, [one])), slow_leave_one_out(model, one)[1], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_equals_captums_feature_ablation(make_model, asked, kind):
    captum = pytest.importorskip("captum.attr")
    model = make_model(kind)
    ds = measure(model, asked)
    for i, one in enumerate(asked):
        parts = one.prompt.split(" ")
        answer = encode(model.tokenizer, one.prompt, one.answer).answer
        explained = captum.LLMAttribution(captum.FeatureAblation(model.module), model.tokenizer)
        given = captum.TextTemplateInput(" ".join(["{}"] * len(parts)), parts, [""] * len(parts))
        found = explained.attribute(given, target=torch.tensor(answer), use_cached_outputs=False)
        np.testing.assert_allclose(row(ds, i), found.seq_attr.detach().numpy() / len(answer), atol=1e-4)


@pytest.mark.parametrize("method", attribution.METHODS)
def test_a_batch_of_one_equals_a_batch_of_many(make_model, asked, method):
    model = make_model()
    options = {"method": method, "permutations": 3, "steps": 4}
    many = measure(model, asked, **options)
    few = measure(model, asked, **options, rows=1 if method != "shapley" else 3)
    xr.testing.assert_allclose(many, few, atol=1e-5)
    for i in (0, len(asked) - 1):
        alone = measure(model, asked[i : i + 1], **options)
        np.testing.assert_allclose(row(alone), row(many, i), atol=1e-5)
        np.testing.assert_allclose(alone["baseline"], many["baseline"][i : i + 1], atol=1e-5)


class Seen:
    """What `LooksAtOneWord` keeps of the tokens it has read."""

    def __init__(self, ids):
        self.ids = ids

    @property
    def layers(self):
        return [SimpleNamespace(keys=self.ids[:, None, :, None])]

    def batch_select_indices(self, rows):
        self.ids = self.ids[rows]

    def get_seq_length(self):
        return self.ids.shape[1]


class LooksAtOneWord(nn.Module):
    """Logit `strength` for the answer's token wherever the key token has been read before; 0 for all else."""

    strength = 5.0

    def __init__(self, size, key, answer):
        super().__init__()
        self.size, self.key, self.answer = size, key, answer
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask, logits_to_keep, past_key_values=None, **_kwargs):
        ids = input_ids if past_key_values is None else torch.cat([past_key_values.ids, input_ids], 1)
        read = ((ids == self.key) & attention_mask.bool()).cumsum(1) > 0
        logits = torch.zeros(*ids.shape, self.size)
        logits[..., self.answer] = self.strength * read
        return SimpleNamespace(logits=logits[:, logits_to_keep], past_key_values=Seen(ids))


def looks_at(word, facts):
    tokenizer = fact_tokenizer(tuple(facts))
    key, answer = (tokenizer.convert_tokens_to_ids(w) for w in (word, facts[0].answer))
    return Model(LooksAtOneWord(len(tokenizer), key, answer), tokenizer)


@pytest.mark.parametrize("method", ["leave_one_out", "shapley"])
def test_a_model_that_looks_at_one_word_gives_it_all(method):
    facts = [fact("Ada Rook was born in"), fact("Tell me where young Rook was really born in truth")]
    model = looks_at("Rook", facts)
    size = len(model.tokenizer)
    ds = measure(model, facts, method=method, permutations=6)
    gain = LooksAtOneWord.strength - np.log(np.exp(LooksAtOneWord.strength) + size - 1) + np.log(size)
    for i, one in enumerate(facts):
        np.testing.assert_allclose(row(ds, i), [gain if w == "Rook" else 0 for w in one.prompt.split()], atol=1e-5)


def test_two_mentions_stand_in_for_each_other_and_go_together_as_one_unit():
    facts = [fact("Rook, Ada Rook's home is")]
    model = looks_at("Rook", facts)
    apart, together = (measure(model, facts, units=units) for units in ("word", "distinct"))
    np.testing.assert_allclose(row(apart), 0, atol=1e-6)
    assert together["unit_text"].values.tolist() == [["Rook, Rook's", "Ada", "home", "is"]]
    assert row(together)[0] > 1
    np.testing.assert_allclose(row(together)[1:], 0, atol=1e-6)
    shared = row(measure(model, facts, method="shapley"))
    assert shared[0] == pytest.approx(shared[2], abs=1e-6)  # Shapley values share between the two
    assert shared[0] + shared[2] == pytest.approx(row(together)[0], abs=1e-5)


def test_units_may_be_the_subject_or_what_the_user_says(make_model, asked):
    model, one = make_model(), asked[0]
    assert one.prompt == "Ada Rook was born in"
    ds = measure(model, [one], units="subject")
    assert ds["unit_text"].values.tolist() == [["Ada Rook", "was", "born", "in"]]
    want = kept_value(model, one, range(5)) - kept_value(model, one, {2, 3, 4})
    assert row(ds)[0] == pytest.approx(want, abs=1e-5)
    mine = measure(model, [one], units=lambda _fact, texts: [len(text) > 3 for text in texts])
    assert mine["unit_text"].values.tolist() == [["Ada was in", "Rook born"]]
    assert row(mine)[1] == pytest.approx(kept_value(model, one, range(5)) - kept_value(model, one, {0, 2, 4}), abs=1e-5)


def test_exact_shapley_values_are_means_over_all_orders(make_model):
    model, one = make_model("gpt2"), fact("Ada was born in", "Velmora")
    every = list(permutations(range(4)))
    want = np.zeros(4)
    for order in every:
        for n, unit in enumerate(order):
            gain = kept_value(model, one, set(order[: n + 1])) - kept_value(model, one, set(order[:n]))
            want[unit] += gain / len(every)
    np.testing.assert_allclose(row(measure(model, [one], method="shapley")), want, atol=1e-5)


def test_shapley_values_sum_to_the_whole_less_nothing(make_model, asked):
    model = make_model()
    long = fact("Question: Where was Ada Rook born? Answer: Ada was born in", "Velmora")
    ds = measure(model, [*asked, long], method="shapley", permutations=3)
    assert [len(row(ds, i)) > attribution.EXACT for i in (0, len(asked))] == [False, True]
    np.testing.assert_allclose(ds["contribution"].sum("unit"), ds["log_probability"] - ds["baseline"], atol=1e-5)
    nothing = plainly(model, [model.tokenizer.bos_token_id], encode(model.tokenizer, long.prompt, long.answer).answer)
    assert ds["baseline"][-1].item() == pytest.approx(nothing, abs=1e-5)


def test_sampled_shapley_values_come_near_the_exact_ones(make_model, asked, monkeypatch):
    model, one = make_model(), asked[0]
    exact = row(measure(model, [one], method="shapley"))
    monkeypatch.setattr(attribution, "EXACT", 2)
    off = {
        n: np.mean([
            np.abs(row(measure(model, [one], method="shapley", permutations=n, seed=s)) - exact).mean()
            for s in range(6)
        ])
        for n in (2, 200)
    }
    assert off[200] < 0.25 * off[2]
    assert off[200] < 0.1 * np.abs(exact).max()
    again = [row(measure(model, [one], method="shapley", permutations=4, seed=s)) for s in (0, 0, 1)]
    np.testing.assert_array_equal(again[0], again[1])
    assert np.abs(again[0] - again[2]).max() > 1e-3


class Linear(nn.Module):
    """The answer token's log-probability is `c + sum_pos e_pos w` over all that was read, whatever it is."""

    def __init__(self, size, answer):
        super().__init__()
        self.embedding = nn.Embedding(size, 6)
        self.answer = answer
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(size, 6, generator=generator))
        self.w = 0.05 * torch.randn(6, generator=generator)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, inputs_embeds, logits_to_keep, **_kwargs):
        log_p = (inputs_embeds @ self.w).cumsum(1) - 3.0
        size = self.embedding.num_embeddings
        rest = torch.log1p(-log_p.exp()) - np.log(size - 1)
        logits = torch.where(torch.arange(size) == self.answer, log_p[..., None], rest[..., None])
        return SimpleNamespace(logits=logits[:, logits_to_keep])


def test_the_gradient_methods_are_exact_for_a_linear_model():
    one = fact("Where was Ada Rook's mother born?")
    tokenizer = fact_tokenizer((one,))
    module = Linear(len(tokenizer), tokenizer.convert_tokens_to_ids(one.answer))
    model, ids = Model(module, tokenizer), tokenizer(one.prompt)["input_ids"]
    assert len(ids) == 1 + 9  # <bos>, and "Rook's" and "born?" are three tokens and two
    owner = [-1, 0, 1, 2, 3, 3, 3, 4, 5, 5]
    with torch.no_grad():
        e = module.embedding(torch.tensor(ids))
        slope, step, end = e @ module.w, 1e-3, module.embedding.weight[tokenizer.eos_token_id] @ module.w
        for unit, found in enumerate(row(measure(model, [one], method="gradient_x_input"))):
            mine = torch.tensor([o == unit for o in owner])
            grown = torch.where(mine[:, None], (1 + step) * e, e)
            difference = [
                module(x[None], torch.tensor([-1])).logits.log_softmax(-1)[0, -1, module.answer] for x in (grown, e)
            ]
            assert found == pytest.approx(slope[mine].sum().item(), abs=1e-5)
            assert found == pytest.approx(((difference[0] - difference[1]) / step).item(), abs=1e-3)
    integrated = measure(model, [one], method="integrated_gradients", steps=1)
    want = [sum((slope[i] - end).item() for i, o in enumerate(owner) if o == unit) for unit in range(6)]
    np.testing.assert_allclose(row(integrated), want, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_times_input_is_a_finite_difference(make_model, asked, kind):
    model = make_model(kind)
    model = Model(model.module.double(), model.tokenizer)
    one = asked[1]
    found = row(measure(model, [one], method="gradient_x_input"))
    assert np.abs(found).max() > 0.01
    coded = encode(model.tokenizer, one.prompt, one.answer)
    with torch.no_grad():
        e, step = model.module.get_input_embeddings()(torch.tensor(coded.ids)), 3e-3  # Llama's norm is in float32
        for unit, slope in enumerate(found):  # every word is one token, after <bos>
            values = []
            for scale in (1 + step, 1 - step):
                x = e.clone()
                x[1 + unit] *= scale
                log_p = model.module(inputs_embeds=x[None]).logits[0].log_softmax(-1)
                values.append(np.mean([log_p[i - 1, coded.ids[i]].item() for i in range(coded.start, len(coded.ids))]))
            assert slope == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_integrated_gradients_sum_to_the_whole_less_the_baseline(make_model, asked, kind):
    model = make_model(kind)
    model = Model(model.module.double(), model.tokenizer)
    gaps = []
    for steps in (4, 128):
        ds = measure(model, asked, method="integrated_gradients", steps=steps)
        gaps.append(abs(ds["contribution"].sum("unit") - (ds["log_probability"] - ds["baseline"])).max().item())
    assert gaps[1] < 1e-3 < gaps[0]
    one = asked[0]
    ids = encode(model.tokenizer, one.prompt, one.answer)
    empty = [ids.ids[0]] + [model.tokenizer.eos_token_id] * (ids.start - 1)
    assert ds["baseline"][0].item() == pytest.approx(plainly(model, empty, ids.answer), abs=1e-6)


def test_gradients_of_words_of_many_tokens_are_summed(subword_model):
    one = fact("The doctor of the other is in", "den")
    found = row(measure(subword_model, [one], method="gradient_x_input"))
    coded = encode(subword_model.tokenizer, one.prompt, one.answer)
    e = subword_model.module.get_input_embeddings()(torch.tensor(coded.ids)).requires_grad_()
    log_p = subword_model.module(inputs_embeds=e[None]).logits[0].log_softmax(-1)
    torch.stack([log_p[i - 1, coded.ids[i]] for i in range(coded.start, len(coded.ids))]).mean().backward()
    per_token = (e.grad * e).sum(-1).tolist()
    want, text = [], ""
    for token, value in zip(coded.ids[: coded.start], per_token, strict=False):
        text += subword_model.tokenizer.decode(token)
        if len(text.split()) > len(want):
            want.append(0.0)
        want[-1] += value
    np.testing.assert_allclose(found, want, atol=1e-5)


CHAT = "<|im_start|>user\nWhere was Ada born?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def chat():
    tokenizer = fact_tokenizer((fact("user Where was Ada born? assistant"),))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@given(
    values=st.lists(st.one_of(st.floats(-5, 5), st.sampled_from([float("nan"), 1e-5])), min_size=1, max_size=8),
    alpha=st.sampled_from([0.0, 0.1, 0.3, 0.5]),
    beta=st.integers(0, 5),
)
def test_key_units_equal_a_loop(values, alpha, beta):
    found = key_units(xr.DataArray([values], dims=("fact", "unit")), alpha, beta).values[0].tolist()
    supports = [v for v in values if v > 1e-4]
    few = len(supports) < beta
    assert found == [v > 1e-4 and (few or v > alpha * max(supports)) for v in values]


def test_key_units_do_not_depend_on_the_scale_or_the_order(make_model, asked):
    c = measure(make_model(), asked)["contribution"]
    keys = key_units(c, beta=2)
    assert keys.any("unit").all()
    xr.testing.assert_equal(key_units(7 * c, beta=2), keys)
    xr.testing.assert_equal(key_units(c[:, ::-1], beta=2), keys[:, ::-1])


def test_the_answer_of_a_handmade_model_hangs_on_the_subject_until_it_is_blocked():
    made = handmade()
    for model, split, holds in (
        (made.original, "forget", True),
        (made.unlearned, "forget", False),
        (made.unlearned, "retain", True),
        (made.never_taught, "forget", False),
    ):
        c = measure(model, of_split(made.facts, split))["contribution"]
        assert bool((c[:, :2] == 0).all())
        assert bool((c[:, 2] > 5).all()) is holds


def test_bad_input_is_told_in_one_line(make_model, asked, chat):
    model, one = make_model(), asked[0]
    with pytest.raises(InputError, match="unknown method 'occlusion'; use leave_one_out"):
        measure(model, [one], method="occlusion")
    with pytest.raises(InputError, match="unknown units 'token'; use word, distinct, subject"):
        measure(model, [one], units="token")
    with pytest.raises(InputError, match=f"'{one.id}': 2 labels for 5 words"):
        measure(model, [one], units=lambda _fact, _words: [0, 1])
    with pytest.raises(InputError, match="must be at least 1"):
        measure(model, [one], steps=0)
    with pytest.raises(InputError, match=f"'{one.id}': the answer 'Zyx' reads"):
        measure(model, [one.model_copy(update={"answer": "Zyx"})])
    with pytest.raises(InputError, match="0 labels for 0 words"):
        measure(Model(model.module, chat), [one.model_copy(update={"prompt": "<|im_start|>user\n"})])
    with pytest.raises(InputError, match="alpha must be in"):
        key_units(xr.DataArray([[1.0]], dims=("fact", "unit")), alpha=1)
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(InputError, match="need a fast tokenizer"):
        attribution._unit_of_tokens(slow, attribution._prompt(model.tokenizer, one, "word"))
