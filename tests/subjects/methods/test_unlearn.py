import inspect
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.subjects import methods
from lethescope.subjects.methods import METHODS, method_named, options_of, unlearn
from lethescope.subjects.silence import said

LOSSES = [name for name in METHODS if hasattr(method_named(name, {}), "loss")]
RETAINING = [name for name in LOSSES if "alpha" in options_of(method_named(name, {}))]
SETTINGS = {"satimp": {"beta1": 1.0, "gamma": 1.0}, "simnpo": {"beta": 1.0, "gamma": 1.0}}
"""What a method needs, beside a retain weight of 5, to do more to a two-layer model than training on retain does."""


def add(monkeypatch, name, **functions):
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setattr(methods, "METHODS", (*METHODS, name))
    monkeypatch.setitem(sys.modules, f"{methods.__name__}.{name}", module)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("method", LOSSES)
def test_the_same_seed_gives_the_same_weights(toy, run, method, lora):
    torch.manual_seed(0)
    first = weights(run(toy, method=method, lora=lora))
    torch.manual_seed(1)
    assert equal(first, weights(run(toy, method=method, lora=lora)))
    assert not equal(first, weights(run(toy, method=method, lora=lora, seed=1)))
    assert not equal(first, weights(toy.model))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("method", RETAINING)
def test_forget_goes_down_and_retain_stays(taught, run, method, lora):
    settings = {"steps": 60, "lr": 2e-2 if lora else 3e-3, "alpha": 5.0} | SETTINGS.get(method, {})
    model = run(taught, method=method, lora=lora, **settings)
    forget, retain = (of_split(taught.facts, split) for split in ("forget", "retain"))
    before = said(taught.model, taught.tokenizer, forget).probability
    assert said(model, taught.tokenizer, forget).probability < 0.2 * before
    assert said(model, taught.tokenizer, retain).exact > 0.8


@pytest.mark.parametrize("method", LOSSES)
def test_only_logits_that_predict_answer_tokens_get_a_gradient(loops, method):
    loss, model = method_named(method, {}).loss, loops.fixed(0)
    given = {"start": loops.fixed(1), "fresh": loops.fixed(2), "refused": loops.refused, "done": 0.5}
    asked = {name: thing for name, thing in given.items() if name in inspect.signature(loss).parameters}
    loss(model, loops.forget, loops.retain, **asked).backward()
    seen = [batch for batch in (loops.forget, loops.retain, loops.refused) if model.leaf(batch).grad is not None]
    assert seen
    for batch in seen:
        touched = model.leaf(batch).grad.abs().sum(-1) > 0
        assert touched.any() and not touched[:, -1].any()
        assert not (touched[:, :-1] & ~batch.answer_mask[:, 1:]).any()


def test_adapters_are_merged_and_only_linear_layers_change(toy, run):
    model = run(toy, lora=True)
    before, after = weights(toy.model), weights(model)
    assert before.keys() == after.keys()
    assert not any("lora" in name for name, _ in model.named_modules())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith("_proj.weight") for name in changed)
    deltas = [after[name] - before[name] for name in changed]
    assert max(torch.linalg.matrix_rank(delta, rtol=1e-4).item() for delta in deltas) <= 8


@pytest.mark.parametrize("lora", [False, True])
def test_mode_flags_gradients_and_random_state_are_put_back(toy, run, lora):
    toy.model.requires_grad_(False).train()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    model = run(toy, lora=lora)
    assert torch.equal(torch.rand(2), expected)
    assert model.training and not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_conv1d_models_can_be_unlearned(toy, run):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(toy.tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
        toy.model = GPT2LMHeadModel(config).train()
    for lora in (False, True):
        first, again = run(toy, lora=lora), run(toy, lora=lora)
        assert equal(weights(first), weights(again)), "dropout must be off"
        assert not equal(weights(first), weights(toy.model))


def test_a_new_method_is_one_module_with_a_loss(toy, run, monkeypatch):
    seen = []

    def loss(model, forget, retain, *, start, weight=1.0):
        assert not any(p.requires_grad for p in start.parameters())
        seen.append((forget.answer_mask.shape[0], retain.answer_mask.shape[0], weight))
        return weight * model(**forget.inputs()).logits.square().mean()

    add(monkeypatch, "small", loss=loss)
    run(toy, method="small", weight=0.5, steps=3, batch_size=5)
    assert seen == [(5, 5, 0.5)] * 3


def test_every_example_comes_once_before_any_comes_again(toy, run, monkeypatch):
    rows = []

    def loss(model, forget, retain):
        pairs = zip(forget.input_ids, forget.attention_mask, strict=True)
        rows.extend(tuple(ids[mask.bool()].tolist()) for ids, mask in pairs)
        return model(**retain.inputs()).logits.mean()

    add(monkeypatch, "watch", loss=loss)
    run(toy, method="watch", steps=10, batch_size=7)
    examples = sum(1 + len(f.paraphrases) for f in of_split(toy.facts, "forget"))
    assert examples == 32
    assert len(set(rows[:examples])) == examples and set(rows[examples : 2 * examples]) == set(rows[:examples])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'; use one of .*graddiff, .*npo"),
        ({"bta": 0.1}, "no option 'bta'; the nearest is 'beta'"),
        ({"start": None}, "no option 'start'"),
        ({"lr": math.inf}, "not finite|loss is"),
    ],
)
def test_bad_settings_are_refused_in_one_line(toy, run, options, message):
    with pytest.raises(InputError, match=message) as caught:
        run(toy, **options)
    assert "\n" not in str(caught.value)


def test_empty_splits_are_refused(toy):
    with pytest.raises(InputError, match="no forget facts"):
        unlearn(toy.model, (), toy.facts, tokenizer=toy.tokenizer)
    with pytest.raises(InputError, match="no retain facts"):
        unlearn(toy.model, toy.facts, (), tokenizer=toy.tokenizer)


def test_half_precision_is_refused(toy):
    with pytest.raises(InputError, match=r"model\.float\(\)"):
        unlearn(toy.model.half(), toy.facts, toy.facts, tokenizer=toy.tokenizer)


def test_a_loss_is_given_what_it_names(toy, run, monkeypatch):
    seen = []

    def loss(model, forget, retain, *, fresh, refused, done):
        assert not any(p.requires_grad for p in fresh.parameters())
        assert not equal(weights(fresh), weights(toy.model))
        prompts = [
            [b.input_ids[i][: b.answer_mask[i].int().argmax()].tolist() for i in range(len(b.input_ids))]
            for b in (forget, refused)
        ]
        assert prompts[0] == prompts[1]
        answers = {tuple(refused.input_ids[i][refused.answer_mask[i]].tolist()) for i in range(len(refused.input_ids))}
        assert answers <= {tuple(toy.tokenizer(r, add_special_tokens=False)["input_ids"]) for r in ("baker", "cello")}
        seen.append(done)
        return model(**retain.inputs()).logits.mean()

    add(monkeypatch, "named", loss=loss)
    run(toy, method="named", steps=4, refusals=("baker", "cello"))
    assert seen == [0, 0.25, 0.5, 0.75]


def test_an_edit_has_the_model_in_its_own_hands(toy, run, monkeypatch):
    def edit(model, lessons, *, strength=1.0):
        assert sum(len(batch.input_ids) for batch in lessons.once("forget", 5)) == 32
        with torch.no_grad():
            next(model.parameters()).add_(strength)

    add(monkeypatch, "shift", edit=edit)
    assert not equal(weights(run(toy, method="shift", strength=0.5)), weights(toy.model))
    with pytest.raises(InputError, match="method shift edits the weights itself"):
        run(toy, method="shift", lora=True)
    with pytest.raises(InputError, match="no option 'strengh'; the nearest is 'strength'"):
        run(toy, method="shift", strengh=1)


def test_the_methods_page_names_every_method_and_its_options():
    page = (Path(__file__).parents[3] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert set(rows) == set(METHODS)
    for name, line in rows.items():
        for option, default in methods.options_of(methods.method_named(name, {})).items():
            assert f"`{option}={default}`" in line
