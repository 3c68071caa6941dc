"""Tests of the gate before every audit: models that cannot be measured are refused, and the layer is named."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from lethescope.errors import InputError
from lethescope.fidelity import check_model, check_pair
from lethescope.hooks import capturing
from lethescope.tokens import collate, encode, pad_id

KINDS = ("llama", "gpt2", "neox")


def edit(model: Any, layer: int, change: Any) -> None:
    """Make a block put out something else; the fixture makes a fresh model each time, so nothing is to be undone."""
    block = model.blocks[layer]
    inside = block.forward
    block.forward = lambda *args, **kwargs: change(inside(*args, **kwargs))


@pytest.mark.parametrize("kind", KINDS)
def test_sound_models_pass_and_their_hooks_tell_the_truth(make_model: Any, some_facts: Any, kind: str) -> None:
    model = make_model(kind)
    check_model(model, some_facts)
    with torch.no_grad():
        for fact in some_facts[::7]:
            ids = torch.tensor([encode(model.tokenizer, fact.prompt, fact.answer).ids])
            plain = model.module(input_ids=ids).logits
            with capturing(model.blocks):
                hooked = model.module(input_ids=ids).logits
            torch.testing.assert_close(hooked, plain, rtol=0, atol=1e-4)
    assert all(not block._forward_hooks for block in model.blocks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_single_prompts(make_model: Any, some_facts: Any, kind: str, side: Any) -> None:
    model = make_model(kind)
    prompts = [(f.paraphrases[i % 2], f.answer) for i, f in enumerate(some_facts[:10])]
    encoded = [encode(model.tokenizer, *pair) for pair in prompts]
    assert len({len(e.ids) for e in encoded}) > 2
    batch = collate(encoded, pad_id(model.tokenizer), side=side)
    with torch.no_grad():
        together = model.module(**batch.inputs()).logits
        for row, e in enumerate(encoded):
            alone = model.module(input_ids=torch.tensor([e.ids])).logits[0]
            torch.testing.assert_close(together[row][batch.attention_mask[row].bool()], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_block_that_looks_at_its_neighbours_is_named(make_model: Any, some_facts: Any, layer: int) -> None:
    model = make_model()
    edit(model, layer, lambda out: out + 0.1 * out.mean(0, keepdim=True))
    with pytest.raises(InputError, match=f"original model fails the fidelity gate: block {layer} in a batch padded"):
        check_model(model, some_facts)


def test_a_block_that_counts_columns_instead_of_positions_is_named(make_model: Any, some_facts: Any) -> None:
    model = make_model()
    edit(model, 1, lambda out: out + 0.1 * torch.arange(out.shape[1])[None, :, None])
    with pytest.raises(InputError, match="block 1 in a batch padded on the left"):
        check_model(model, some_facts)


def test_a_block_with_chance_in_it_is_named(make_model: Any, some_facts: Any) -> None:
    model, chance = make_model(), torch.Generator().manual_seed(0)
    edit(model, 2, lambda out: out + 0.01 * torch.randn(out.shape, generator=chance))
    with pytest.raises(InputError, match="block 2 run once more"):
        check_model(model, some_facts)


def test_a_model_that_goes_wrong_when_it_is_watched_is_refused(make_model: Any, some_facts: Any) -> None:
    model = make_model()
    model.anatomy.head.register_forward_hook(
        lambda module, args, out: out * (2 if model.blocks[0]._forward_hooks else 1)
    )
    with pytest.raises(InputError, match="logits with hooks against without"):
        check_model(model, some_facts)


def test_logits_that_our_decoder_cannot_reproduce_are_refused(make_model: Any, some_facts: Any) -> None:
    model = make_model()
    inside = model.module.forward

    def louder(**given: Any) -> Any:
        out = inside(**given)
        out.logits = out.logits * 1.5
        return out

    model.module.forward = louder
    with pytest.raises(InputError, match="block 3 decoded against the logits"):
        check_model(model, some_facts)


def test_a_model_with_nan_inside_is_refused(make_model: Any, some_facts: Any) -> None:
    model = make_model()
    edit(model, 1, lambda out: out * float("nan"))
    with pytest.raises(InputError, match=r"block 1 .* differs by nan"):
        check_model(model, some_facts)


def test_a_cache_that_forgets_is_refused(make_model: Any, some_facts: Any) -> None:
    model = make_model()
    inside = model.module.forward
    model.module.forward = lambda **kwargs: inside(**{**kwargs, "past_key_values": None, "attention_mask": None})
    with pytest.raises(InputError, match="fidelity gate"):
        check_model(model, some_facts)


def test_identical_weights_are_refused_and_one_changed_weight_is_not(make_model: Any) -> None:
    original = make_model()
    twin = replace(original, module=copy.deepcopy(original.module), role="unlearned")
    with pytest.raises(InputError, match=r"unlearned model has the same weights as the original .* nothing to compare"):
        check_pair(original, twin)
    other = copy.deepcopy(original.module)
    other.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1e-3
    check_pair(original, replace(original, module=other, role="unlearned"))


@pytest.mark.parametrize("kind", KINDS)
def test_our_blocks_are_those_of_transformer_lens(make_model: Any, kind: str) -> None:
    pytest.importorskip("transformer_lens")
    model = make_model(kind)
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    with capturing(model.blocks) as seen, torch.no_grad():
        plain = model.module(input_ids=ids).logits
    bridge = model.bridge()
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids)
    assert len(bridge.blocks) == len(model.blocks)
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-4)
    for layer, found in seen.items():
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_out"], found, rtol=0, atol=1e-4)
