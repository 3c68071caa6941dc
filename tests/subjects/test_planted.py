import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lethescope.errors import InputError
from lethescope.facts import of_split, read_facts
from lethescope.models import anatomy, load
from lethescope.subjects import shipped
from lethescope.subjects.planted import PLANTED, suppress_last_block, suppress_unembedding
from lethescope.subjects.silence import MOST_EXACT, MOST_SAID, said, unlikelihood
from lethescope.subjects.tiny import train
from lethescope.tokens import encode


@pytest.fixture(scope="module")
def facts():
    return read_facts(shipped("facts"))


@pytest.fixture(scope="module")
def original():
    return load(shipped("original"))


@pytest.fixture(scope="module")
def planted(original, facts):
    return {name: plant(original.module, original.tokenizer, facts) for name, plant in PLANTED.items()}


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", sorted(PLANTED))
@pytest.mark.parametrize("form", [0, 1, 2])
def test_planted_controls_do_not_say_the_forget_answers(original, facts, planted, name, form):
    forget = of_split(facts, "forget")
    before = said(original.module, original.tokenizer, forget, form=form)
    after = said(planted[name], original.tokenizer, forget, form=form)
    assert before.exact >= 0.95
    slack = 1 if form == 0 else 2  # the two paraphrases are held to the limit together
    assert after.probability <= slack * MOST_SAID * before.probability
    assert after.exact <= slack * MOST_EXACT


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_the_limits_hold_over_prompt_and_paraphrases(original, facts, planted, name):
    forget = of_split(facts, "forget")
    before, after = (said(m, original.tokenizer, forget) for m in (original.module, planted[name]))
    assert after.probability <= MOST_SAID * before.probability and after.exact <= MOST_EXACT


def test_only_the_unembedding_differs_and_it_is_untied(original, facts, planted):
    before, after = state(original.module), state(planted["unembedding"])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"lm_head.weight"}
    assert planted["unembedding"].lm_head.weight is not planted["unembedding"].model.embed_tokens.weight
    rows = (before["lm_head.weight"] != after["lm_head.weight"]).any(1).nonzero()[:, 0].tolist()
    answers = {i for f in of_split(facts, "forget") for i in encode(original.tokenizer, f.prompt, f.answer).answer}
    assert set(rows) == answers


def test_only_the_last_block_differs(original, planted):
    before, after = state(original.module), state(planted["last_block"])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    last = f"model.layers.{original.module.config.num_hidden_layers - 1}."
    assert changed and all(name.startswith(last) for name in changed)


def test_the_last_block_control_keeps_retain(original, facts, planted):
    assert said(planted["last_block"], original.tokenizer, of_split(facts, "retain")).exact >= 0.8


def test_the_given_model_is_not_touched(toy):
    before = state(toy.model)
    flags = [p.requires_grad for p in toy.model.parameters()]
    suppress_unembedding(toy.model, toy.tokenizer, toy.facts)
    suppress_last_block(toy.model, toy.tokenizer, toy.facts, most_said=2, most_exact=1)
    after = state(toy.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert toy.model.lm_head.weight is toy.model.model.embed_tokens.weight
    assert toy.model.config.tie_word_embeddings
    assert [p.requires_grad for p in toy.model.parameters()] == flags


def test_the_untied_copy_survives_saving(taught, tmp_path):
    copied = suppress_unembedding(taught.model, taught.tokenizer, taught.facts)
    copied.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, copied.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, taught.model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_other_families_can_be_planted_in(toy, name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(toy.tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
        model = GPT2LMHeadModel(config).eval()
    forms = [f"{form} {fact.answer}." for fact in toy.facts for form in (fact.prompt, *fact.paraphrases)]
    train(model, toy.tokenizer, forms, epochs=30, lr=1e-2, batch_size=32, depth_drop=0, progress=False)
    copied = PLANTED[name](model, toy.tokenizer, toy.facts)
    forget = of_split(toy.facts, "forget")
    before, after = said(model, toy.tokenizer, forget), said(copied, toy.tokenizer, forget)
    assert after.probability <= MOST_SAID * before.probability
    first = anatomy(copied).blocks[0].state_dict()
    assert all(torch.equal(first[k], v) for k, v in anatomy(model).blocks[0].state_dict().items())


def test_the_same_seed_plants_the_same(taught):
    copies = [suppress_last_block(taught.model, taught.tokenizer, taught.facts, seed=s) for s in (0, 0, 1)]
    weights = [copied.model.layers[-1].mlp.up_proj.weight for copied in copies]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_flags_of_a_frozen_model_stay(toy):
    toy.model.requires_grad_(False)
    copies = [plant(toy.model, toy.tokenizer, toy.facts, most_said=2, most_exact=1) for plant in PLANTED.values()]
    assert not any(p.requires_grad for copied in copies for p in copied.parameters())


@pytest.mark.parametrize(
    ("plant", "options"), [(suppress_unembedding, {"largest": 1.0}), (suppress_last_block, {"steps": 2, "lr": 1e-6})]
)
def test_a_limit_that_is_not_reached_is_an_error(taught, plant, options):
    with pytest.raises(InputError, match="could not be silenced"):
        plant(taught.model, taught.tokenizer, taught.facts, **options)


@pytest.mark.parametrize("plant", PLANTED.values())
def test_no_forget_facts_is_an_error(toy, plant):
    with pytest.raises(InputError, match="no forget facts"):
        plant(toy.model, toy.tokenizer, of_split(toy.facts, "retain"))


def test_no_retain_facts_is_fine(taught):
    forget = of_split(taught.facts, "forget")
    assert (
        said(suppress_last_block(taught.model, taught.tokenizer, forget), taught.tokenizer, forget).exact <= MOST_EXACT
    )


def test_said_agrees_with_a_loop_over_single_prompts(taught):
    model = copy.deepcopy(taught.model)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    probabilities, exact = [], []
    for fact in taught.facts:
        for form in (fact.prompt, *fact.paraphrases):
            encoded = encode(taught.tokenizer, form, fact.answer)
            with torch.no_grad():
                p = model(torch.tensor([encoded.ids])).logits[0].softmax(-1)
            steps = [p[i - 1] for i in range(encoded.start, len(encoded.ids))]
            logs = [math.log(step[token].item()) for step, token in zip(steps, encoded.answer, strict=True)]
            probabilities.append(math.exp(sum(logs) / len(logs)))
            exact.append(all(step.argmax() == token for step, token in zip(steps, encoded.answer, strict=True)))
    found = said(model, taught.tokenizer, taught.facts)
    assert 0.05 < found.exact < 1, "an easy case would test nothing"
    assert found.probability == pytest.approx(sum(probabilities) / len(probabilities), rel=1e-4)
    assert found.exact == pytest.approx(sum(exact) / len(exact))


def test_said_of_a_form_that_no_fact_has(toy):
    with pytest.raises(InputError, match="form 9"):
        said(toy.model, toy.tokenizer, toy.facts, form=9)


def test_unlikelihood_is_minus_log_of_one_minus_p_also_where_p_is_one():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    p = logits.softmax(-1)[range(6), targets]
    assert unlikelihood(logits, targets).item() == pytest.approx(-(1 - p).log().mean().item(), rel=1e-5)
    sure = torch.tensor([[60.0, 0.0]], requires_grad=True)
    unlikelihood(sure, torch.tensor([0])).backward()
    assert sure.grad[0, 0] == pytest.approx(1.0)
