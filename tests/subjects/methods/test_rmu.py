import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig, OPTConfig

from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.models import anatomy
from lethescope.subjects.methods import rmu
from lethescope.subjects.methods.training import Lessons
from lethescope.subjects.silence import said


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


FAMILIES = {  # as wide inside as outside, so that every map has the width of the one that is looked for
    "model.layers.0.mlp.down_proj.weight": LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    ),
    "transformer.h.0.mlp.c_proj.weight": GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, n_positions=8),
    "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": GPTNeoXConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    ),
    "model.decoder.layers.0.fc2.weight": OPTConfig(
        hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9, word_embed_proj_dim=16
    ),
}


def built(config):
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mlps_output_weight_is_found_in_every_family(name):
    model = built(FAMILIES[name])
    assert rmu.output_weight(anatomy(model).blocks[0], 16) is model.get_parameter(name)


def test_stacked_experts_are_refused():
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=9,
        num_local_experts=2,
    )
    with pytest.raises(InputError, match="MixtralDecoderLayer has no linear map to 16"):
        rmu.output_weight(anatomy(built(config)).blocks[0], 16)


def test_the_control_vector_is_fixed_by_the_seed(toy):
    first, again, other = (rmu.control_vector(toy.model, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert first.norm().item() == pytest.approx(1.0, rel=1e-6) and first.min() >= 0 and len(first) == 48


@pytest.mark.parametrize(("depth", "expected"), [(1, 0), (2, 1), (16, 6), (32, 13)])
def test_the_layer_is_two_fifths_up(depth, expected):
    assert rmu.chosen_layer(None, depth) == expected
    assert rmu.chosen_layer(0, depth) == 0


@pytest.mark.parametrize(("gamma", "alpha", "coefficient"), [(1.0, 1.0, 2.0), (0.5, 10.0, 30.0)])
def test_loss_agrees_with_the_formula_in_a_loop(monkeypatch, toy, lessons_for, gamma, alpha, coefficient):
    found = []

    def two(trained, lessons, step):
        for _ in range(2):  # the second time the model has moved, and only then does the retain term weigh anything
            found.append(step(0.0).item())
            with torch.no_grad():
                trained[0].mul_(50.0)

    monkeypatch.setattr(rmu, "descend", two)
    model, lessons = copy.deepcopy(toy.model), lessons_for(toy, seed=3)
    rmu.edit(model, lessons, layer=0, gamma=gamma, alpha=alpha, coefficient=coefficient)
    aim = (coefficient * rmu.control_vector(toy.model, 3)).tolist()
    moved = copy.deepcopy(toy.model)
    with torch.no_grad():
        moved.model.layers[0].mlp.down_proj.weight.mul_(50.0)
    pairs = zip(lessons.batches("forget"), lessons.batches("retain"), strict=False)
    for loss, now, (forget, retain) in zip(found, (toy.model, moved), pairs, strict=False):
        away = [(x - u) ** 2 for row in slow_states(now, forget) for x, u in zip(row, aim, strict=True)]
        both = zip(slow_states(now, retain), slow_states(toy.model, retain), strict=True)
        drift = [(x - y) ** 2 for a, b in both for x, y in zip(a, b, strict=True)]
        assert loss == pytest.approx(gamma * sum(away) / len(away) + alpha * sum(drift) / len(drift), rel=1e-4)
    assert len(found) == 2 and alpha * sum(drift) / len(drift) > 0.01 * loss


def slow_states(model, batch):
    """What block 0 puts out at the token before every answer token."""
    with torch.no_grad():
        states = model(**batch.inputs(), output_hidden_states=True).hidden_states[1].tolist()
    return [states[i][t - 1] for i, row in enumerate(batch.answer_mask.tolist()) for t in range(1, len(row)) if row[t]]


@pytest.mark.parametrize(("layer", "blocks"), [(0, [0]), (1, [0, 1]), (None, [0, 1])])
def test_only_the_mlps_output_weights_up_to_the_layer_change(toy, run, layer, blocks):
    start, found = weights(toy.model), weights(run(toy, method="rmu", layer=layer))
    changed = {name for name in start if not torch.equal(found[name], start[name])}
    assert changed == {f"model.layers.{b}.mlp.down_proj.weight" for b in blocks}


def test_no_more_than_three_blocks_are_trained():
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=2, vocab_size=9)
    model, seen = built(config), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rmu, "descend", lambda trained, *_: seen.extend(trained))
        rmu.edit(model, Lessons((), (), None, model.device, 1, 1e-3, 1, 0), layer=4)
    assert [id(w) for w in seen] == [id(model.model.layers[b].mlp.down_proj.weight) for b in (2, 3, 4)]


def test_blocks_narrow_down_what_is_trained(toy, run):
    start, found = weights(toy.model), weights(run(toy, method="rmu", layer=1, blocks=[1]))
    assert [name for name in start if not torch.equal(found[name], start[name])] == [
        "model.layers.1.mlp.down_proj.weight"
    ]
    with pytest.raises(InputError, match="name one of these in blocks"):
        run(toy, method="rmu", layer=0, blocks=[1])


def test_mode_and_flags_are_put_back(toy, run):
    toy.model.requires_grad_(False).train()
    toy.model.model.norm.weight.requires_grad_(True)
    model = run(toy, method="rmu")
    assert model.training and [n for n, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_weights(toy, run):
    first, again, other = (weights(run(toy, method="rmu", seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("layer", [2, -1])
def test_a_layer_that_is_not_there_is_refused(toy, run, layer):
    with pytest.raises(InputError, match=f"no layer {layer}; this model's layers are 0 to 1"):
        run(toy, method="rmu", layer=layer)


def test_forget_goes_down_and_retain_stays(taught, run):
    forget, retain = (of_split(taught.facts, split) for split in ("forget", "retain"))
    model = run(taught, method="rmu", steps=100, lr=1e-2, coefficient=20.0)
    before = said(taught.model, taught.tokenizer, forget).probability
    assert said(model, taught.tokenizer, forget).probability < 0.2 * before
    assert said(model, taught.tokenizer, retain).exact > 0.8
