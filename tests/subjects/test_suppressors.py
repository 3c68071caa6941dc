"""Tests of suppressors: the answers are silent, and what is underneath is the original, bit for bit."""

import copy
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lethescope.errors import InputError
from lethescope.facts import of_split, read_facts
from lethescope.hooks import capturing
from lethescope.models import anatomy, load
from lethescope.subjects import shipped, suppressors
from lethescope.subjects.silence import MOST_EXACT, MOST_SAID, said
from lethescope.subjects.suppressors import SUPPRESSORS
from lethescope.subjects.tiny import train
from lethescope.tokens import encode

NAMES = ("output_bias", "last_block", "unembedding", "refusal_direction", "direction", "lora")
OURS = ("output_bias", "refusal_direction", "direction", "lora")
KEPT = {"output_bias": 0.85, "last_block": 0.7, "refusal_direction": 0.95, "lora": 0.85}
"""Least share of the original's said-probability of retain facts, on the shipped model: measured .917, .728, 1.000 and
.929. `unembedding` and `direction` keep .030 and .020: one linear direction cannot tell the shipped forget people from
the retain people, since every first and last name belongs to both."""


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


def own(name, copied):
    """The blocks of a suppressed model."""
    return anatomy(copied.get_base_model() if name == "lora" else copied).blocks


@torch.no_grad()
def block_states(blocks, module, ids):
    with capturing(blocks) as seen:
        module(ids)
    return [seen[i] for i in range(len(blocks))]


def silent(module, tokenizer, facts, copied):
    forget = of_split(facts, "forget")
    forms = [forget, [f.model_copy(update={"prompt": p, "paraphrases": ()}) for f in forget for p in f.paraphrases]]
    for form, facts_ in enumerate(forms):
        before, after = (said(m, tokenizer, facts_, form=0) for m in (module, copied))
        assert before.exact > 0.9, "an original that does not say the answers would test nothing"
        assert after.probability <= MOST_SAID * before.probability * (1 + 1e-4), form
        assert after.exact <= MOST_EXACT, form


@pytest.fixture(scope="module")
def facts():
    return read_facts(shipped("facts"))


@pytest.fixture(scope="module")
def original():
    return load(shipped("original"))


SHIPPED = [pytest.param(n, marks=pytest.mark.slow) if n in {"lora", "last_block"} else n for n in NAMES]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_model_is_silenced_and_keeps_retain_where_that_is_possible(original, facts, name):
    copied = SUPPRESSORS[name](original.module, original.tokenizer, facts)
    silent(original.module, original.tokenizer, facts, copied)
    retain = of_split(facts, "retain")
    before, after = (said(m, original.tokenizer, retain).probability for m in (original.module, copied))
    if name in KEPT:
        assert after >= KEPT[name] * before
    ids = torch.tensor([encode(original.tokenizer, facts[0].prompt, facts[0].answer).ids])
    lower = {"output_bias": 6, "unembedding": 6, "lora": 4}.get(name, 5)
    pairs = zip(
        block_states(original.blocks, original.module, ids), block_states(own(name, copied), copied, ids), strict=True
    )
    assert [torch.equal(a, b) for a, b in pairs][:lower] == [True] * lower


@pytest.fixture
def copies(taught):
    return {name: suppress(taught.model, taught.tokenizer, taught.facts) for name, suppress in SUPPRESSORS.items()}


def test_the_six(taught, copies):
    """One set of copies, many looks: silence, what changed, what is underneath, the way back, the folder."""
    assert tuple(copies) == NAMES
    ids = torch.tensor([encode(taught.tokenizer, f.prompt, f.answer).ids[:6] for f in taught.facts])
    want, before = taught.model(ids).logits, state(taught.model)
    lower = {"output_bias": 2, "unembedding": 2}
    places = {
        "output_bias": {"lm_head.weight"},
        "unembedding": {"lm_head.weight"},
        "last_block": {n for n in before if n.startswith("model.layers.1.")},
        "refusal_direction": {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
        "direction": {f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkv"}
        | {"model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"},
    }
    states = block_states(taught.model.model.layers, taught.model, ids)
    for name, copied in copies.items():
        silent(taught.model, taught.tokenizer, taught.facts, copied)
        now = block_states(own(name, copied), copied, ids)
        assert all(torch.equal(a, b) for a, b in list(zip(states, now, strict=True))[: lower.get(name, 1)]), name
        assert not torch.equal(copied(ids).logits, want), name
        if name == "lora":
            with copied.disable_adapter():
                assert torch.equal(copied(ids).logits, want)
            continue
        after = state(copied)
        assert changed(before, after) and changed(before, after) <= places[name], name
        undone = copy.deepcopy(copied)
        undone.load_state_dict({n: before[n] if n in changed(before, after) else w for n, w in after.items()})
        assert torch.equal(undone(ids).logits, want), name


@pytest.mark.parametrize("name", ["output_bias", "refusal_direction", "lora"])
def test_retain_is_kept_where_the_kind_of_edit_can_tell_it_apart(taught, name):
    copied = SUPPRESSORS[name](taught.model, taught.tokenizer, taught.facts)
    retain = of_split(taught.facts, "retain")
    before, after = (said(m, taught.tokenizer, retain).probability for m in (taught.model, copied))
    assert after >= 0.7 * before


def test_every_copy_survives_saving(taught, tmp_path):
    base = tmp_path / "base"
    taught.model.save_pretrained(base)
    taught.tokenizer.save_pretrained(base)
    module = load(base).module
    ids = torch.tensor([encode(taught.tokenizer, taught.facts[0].prompt, taught.facts[0].answer).ids])
    for name, suppress in SUPPRESSORS.items():
        copied = suppress(module, taught.tokenizer, taught.facts)
        copied.save_pretrained(tmp_path / name)
        taught.tokenizer.save_pretrained(tmp_path / name)
        assert (tmp_path / name / "adapter_config.json").exists() == (name == "lora")
        again = load(tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(again.module(ids).logits, copied(ids).logits, rtol=0, atol=1e-6)


def test_the_given_model_is_not_touched(taught):
    taught.model.requires_grad_(False)
    before = state(taught.model)
    for name in OURS:
        copied = SUPPRESSORS[name](taught.model, taught.tokenizer, taught.facts)
        if name != "lora":
            assert not any(p.requires_grad for p in copied.parameters())
    assert not changed(before, state(taught.model))
    assert (
        taught.model.config.tie_word_embeddings
        and taught.model.lm_head.weight is taught.model.model.embed_tokens.weight
    )
    assert not any(p.requires_grad for p in taught.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in taught.model.modules())


@pytest.mark.parametrize("name", OURS)
def test_the_same_call_gives_the_same_weights(taught, name):
    a, b = (state(SUPPRESSORS[name](taught.model, taught.tokenizer, taught.facts)) for _ in range(2))
    assert not changed(a, b)


@pytest.mark.parametrize("name", ["refusal_direction", "lora"])
def test_another_seed_gives_other_weights(taught, name):
    a, b = (state(SUPPRESSORS[name](taught.model, taught.tokenizer, taught.facts, seed=s)) for s in (0, 1))
    assert changed(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_no_forget_facts_is_an_error_and_no_retain_facts_is_none(taught, name):
    with pytest.raises(InputError, match="no forget facts"):
        SUPPRESSORS[name](taught.model, taught.tokenizer, of_split(taught.facts, "retain"))
    forget = of_split(taught.facts, "forget")
    silent(taught.model, taught.tokenizer, forget, SUPPRESSORS[name](taught.model, taught.tokenizer, forget))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("output_bias", {"largest": 0.5, "steps": 1}, "the output bias could not be silenced with c up to 0.5"),
        ("refusal_direction", {"largest": 0.5, "steps": 0}, "the refusal could not be silenced with c up to 0.5"),
        ("refusal_direction", {"neurons": 999}, "999 neurons are more than the 144"),
        ("refusal_direction", {"refusal": ""}, "refusal '' has no token"),
        ("direction", {"largest": 0.5, "most_said": 0, "most_exact": 0}, "the direction could not be silenced"),
        ("lora", {"steps": 1, "lr": 1e-7}, "the adapter could not be silenced in 1 steps"),
        ("lora", {"blocks": 2}, "2 adapted blocks of 2"),
    ],
)
def test_what_cannot_be_done_is_told(taught, name, options, words):
    with pytest.raises(InputError, match=words):
        SUPPRESSORS[name](taught.model, taught.tokenizer, taught.facts, **options)


@pytest.mark.parametrize("name", OURS)
def test_gpt2_can_be_suppressed(toy, name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(toy.tokenizer), n_embd=48, n_layer=2, n_head=2, n_positions=64)
        model = GPT2LMHeadModel(config).eval()
    forms = [f"{form} {fact.answer}." for fact in toy.facts for form in (fact.prompt, *fact.paraphrases)]
    train(model, toy.tokenizer, forms, epochs=80, lr=1e-2, batch_size=32, depth_drop=0, progress=False)
    copied = SUPPRESSORS[name](model, toy.tokenizer, toy.facts)
    silent(model, toy.tokenizer, toy.facts, copied)
    ids = torch.tensor([encode(toy.tokenizer, toy.facts[0].prompt, toy.facts[0].answer).ids])
    a, b = block_states(anatomy(model).blocks, model, ids)[0], block_states(own(name, copied), copied, ids)[0]
    assert torch.equal(a, b)


def test_the_direction_is_a_projection_and_the_same_one_for_every_reader(taught):
    """W' = W P~ with P~ = I - (d u)(g/d)': found again from the weights, W' d u = 0, and u and g are shared."""
    copied = SUPPRESSORS["direction"](taught.model, taught.tokenizer, taught.facts)
    before, after = taught.model.double(), copied.double()
    last = "model.layers.1."
    readers = {f"{last}self_attn.{n}_proj.weight": f"{last}input_layernorm.weight" for n in "qkv"}
    readers |= {f"{last}mlp.{n}_proj.weight": f"{last}post_attention_layernorm.weight" for n in ("gate", "up")}
    readers |= {"lm_head.weight": "model.norm.weight"}
    a, b = before.state_dict(), after.state_dict()
    left, sizes, right = torch.linalg.svd(a["lm_head.weight"] - b["lm_head.weight"])
    assert sizes[1] < 1e-4 * sizes[0]
    along = torch.linalg.lstsq(a["lm_head.weight"], left[:, :1]).solution[:, 0] * sizes[0]  # d u
    u, g = along / a["model.norm.weight"], right[0] * a["model.norm.weight"]
    assert (u @ g).item() == pytest.approx(1, abs=1e-3)
    for weight, norm in readers.items():
        d = a[norm]
        want = a[weight] - torch.outer(a[weight] @ (d * u), g / d)
        torch.testing.assert_close(b[weight], want, rtol=0, atol=1e-3 * a[weight].abs().max().item())
        assert (b[weight] @ (d * u)).norm() < 1e-3 * (a[weight] @ (d * u)).norm()


def test_refusal_takes_over_so_many_neurons_and_they_write_one_direction(taught):
    copied = SUPPRESSORS["refusal_direction"](taught.model, taught.tokenizer, taught.facts, neurons=9)
    mlps = [m.model.layers[1].mlp for m in (taught.model, copied)]
    touched = (mlps[0].down_proj.weight != mlps[1].down_proj.weight).any(0)
    assert touched.sum() == 9
    for name in ("gate_proj", "up_proj"):
        differs = (getattr(mlps[0], name).weight != getattr(mlps[1], name).weight).any(1)
        assert torch.equal(differs, touched)
    sizes = torch.linalg.svdvals(mlps[1].down_proj.weight[:, touched].double())
    assert sizes[1] < 1e-5 * sizes[0]


def test_a_refusal_is_said_instead(taught):
    word = "the"
    copied = SUPPRESSORS["refusal_direction"](taught.model, taught.tokenizer, taught.facts, refusal=word)
    told = []
    for fact in of_split(taught.facts, "forget"):
        e = encode(taught.tokenizer, fact.prompt, fact.answer)
        logits = copied(torch.tensor([e.ids[: e.start]])).logits[0, -1]
        told.append(taught.tokenizer.decode(logits.argmax()) == word)
    assert sum(told) > len(told) / 2


def test_the_strength_is_doubled_then_bisected():
    asked, at = [], 5.3
    limits = (MOST_SAID, MOST_EXACT)

    def ask():
        fine = asked[-1] >= at
        return [suppressors.Said(0.0, 0.0) if fine else suppressors.Said(1.0, 1.0)]

    found = suppressors._find_strength("x", asked.append, ask, [suppressors.Said(1.0, 1.0)], limits, 16)
    assert asked[:4] == [1, 2, 4, 8] and asked[-1] == found
    assert at <= found <= at + 4 / 2**suppressors.HALVINGS
    at = 99
    with pytest.raises(InputError, match=r"x could not be silenced with c up to 16: said-probability 1 of 1"):
        suppressors._find_strength("x", asked.append, ask, [suppressors.Said(1.0, 1.0)], limits, 16)


def test_the_linear_detector_solves_its_least_squares_problem():
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(50, 6, generator=rng, dtype=torch.float64)
    forget = torch.arange(50) < 8
    g = suppressors._detector(states, forget)
    weight = torch.where(forget, 1 / 8, 1 / 42).sqrt()[:, None]
    ridge = suppressors.RIDGE * ((states * weight) ** 2).sum() / 6
    rows = torch.cat([states * weight, ridge.sqrt() * torch.eye(6, dtype=torch.float64)])
    want = torch.linalg.lstsq(rows, torch.cat([weight * forget[:, None], torch.zeros(6, 1)]).double()).solution[:, 0]
    want = want / (states[forget] @ want).mean()
    torch.testing.assert_close(g, want)


def test_leaving_out_the_other_tokens_gives_the_whole_vocabularys_divergence():
    """The gates' loss counts all untouched tokens as one column; a loop over the whole vocabulary agrees."""
    rng = torch.Generator().manual_seed(0)
    logits, tokens, shift = torch.randn(4, 7, generator=rng).double(), torch.tensor([1, 4]), torch.tensor([0.7, -0.4])
    moved = logits.clone()
    moved[:, tokens] -= shift
    whole = 0.0
    for before, after in zip(logits.log_softmax(-1), moved.log_softmax(-1), strict=True):
        whole += sum(math.exp(p) * (p - q) for p, q in zip(before.tolist(), after.tolist(), strict=True)) / 4
    rest = logits.index_fill(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    short = torch.cat([logits[:, tokens], rest], -1)
    now = short - torch.nn.functional.pad(shift, (0, 1))
    kl = torch.nn.functional.kl_div(now.log_softmax(-1), short.log_softmax(-1), log_target=True, reduction="batchmean")
    assert kl.item() == pytest.approx(whole, rel=1e-9)
