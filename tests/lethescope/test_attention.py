"""Tests of attention rows and head ablation against eager attention, edited weights, and several families."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lethescope.attention import Attention, ablating, attention_rows, mean_outputs
from lethescope.errors import InputError
from lethescope.hooks import watching
from lethescope.models import Model

IDS = torch.tensor([[1, 5, 9, 7, 5, 9, 4, 8, 11, 6, 5, 9], [1, 6, 6, 4, 8, 10, 12, 5, 7, 7, 9, 4]])
WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
WIDE |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "vocab_size": 20}
WIDE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def other(kind: str, tokenizer: Any, attention: str | None = None) -> Model:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **WIDE, **OTHERS[kind])
    module = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return Model(module.requires_grad_(False).eval(), tokenizer)


@pytest.fixture
def make(make_model, words) -> Callable[[str], Model]:
    return lambda kind: other(kind, words) if kind in OTHERS else make_model(kind)


def eager(model: Model, **inputs: Any) -> list[torch.Tensor]:
    """All attention at once, as the model's family computes it."""
    before = model.module.config._attn_implementation
    model.module.set_attn_implementation("eager")
    found = model.module(**inputs, output_attentions=True).attentions
    model.module.set_attn_implementation(before)
    return [a.float() for a in found]


def rows_of(model: Model, positions: list[int], **inputs: Any) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    seen: dict[int, torch.Tensor] = {}
    with attention_rows(model, positions, seen.__setitem__):
        logits = model.module(**inputs).logits
    return seen, logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", *OTHERS])
@torch.no_grad()
def test_one_layer_at_a_time_equals_all_at_once_and_changes_nothing(make, kind):
    model = make(kind)
    plain = model.module(input_ids=IDS).logits
    whole = eager(model, input_ids=IDS)
    seen, logits = rows_of(model, [0, 6, 11, -2], input_ids=IDS)
    assert torch.equal(logits, plain)
    assert sorted(seen) == list(range(len(model.blocks)))
    for layer, attention in enumerate(whole):
        assert seen[layer].shape == (2, 4, 4, 12)
        np.testing.assert_allclose(seen[layer], attention[:, :, [0, 6, 11, 10]], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_not_attended_to(make, kind, side):
    model = make(kind)
    real = torch.ones_like(IDS)
    real[0, (slice(0, 3) if side == "left" else slice(9, 12))] = 0
    inputs = {"input_ids": IDS, "attention_mask": real, "position_ids": (real.cumsum(-1) - 1).clamp(min=0)}
    places = [4, 8]
    seen, _ = rows_of(model, places, **inputs)
    for layer, attention in enumerate(eager(model, **inputs)):
        np.testing.assert_allclose(seen[layer], attention[:, :, places], atol=1e-5)
        assert (seen[layer][0, :, :, real[0] == 0] == 0).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss"])
@torch.no_grad()
def test_it_goes_with_eager_attention_too(make, kind):
    model = make(kind)
    model.module.set_attn_implementation("eager")
    plain = model.module(input_ids=IDS).logits
    seen, logits = rows_of(model, [7], input_ids=IDS)
    assert torch.equal(logits, plain) and len(seen) == len(model.blocks)
    for layer, attention in enumerate(eager(model, input_ids=IDS)):
        np.testing.assert_allclose(seen[layer], attention[:, :, [7]], atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_steps_with_a_cache_see_the_rows_of_one_pass(make, kind):
    model = make(kind)
    whole, _ = rows_of(model, list(range(12)), input_ids=IDS)
    cache = model.module(input_ids=IDS[:, :8], use_cache=True).past_key_values
    for step in range(8, 12):
        seen, _ = rows_of(model, [-1], input_ids=IDS[:, step : step + 1], past_key_values=cache, use_cache=True)
        for layer, rows in seen.items():
            np.testing.assert_allclose(rows[:, :, 0], whole[layer][:, :, step, : step + 1], atol=1e-5)
    cache = model.module(input_ids=IDS[:, :5], use_cache=True).past_key_values
    seen, _ = rows_of(model, [1, 3], input_ids=IDS[:, 5:], past_key_values=cache, use_cache=True)
    np.testing.assert_allclose(seen[0], whole[0][:, :, [6, 8]], atol=1e-5)


def test_a_mask_of_keys_and_a_window_are_kept_without_a_square_mask():
    """What flash attention is given: which keys are real, and how far back a query sees."""
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8, generator=g), torch.randn(2, 2, 6, 8, generator=g)
    real = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    call = Attention(0, torch.nn.Identity(), query, key, key, real, {"scaling": 0.5, "sliding_window": 3}, lambda: None)
    found = call.rows(torch.tensor([2, 5]))
    for b, h, (r, q) in [(b, h, row) for b in range(2) for h in range(4) for row in enumerate((2, 5))]:
        scores = {k: float(query[b, h, q] @ key[b, h // 2, k]) * 0.5 for k in range(q - 2, q + 1) if real[b, k]}
        total = sum(np.exp(s) for s in scores.values())
        wanted = [np.exp(scores[k]) / total if k in scores else 0.0 for k in range(6)]
        np.testing.assert_allclose(found[b, h, r], wanted, atol=1e-6)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))])
        return out


@torch.no_grad()
def test_no_square_of_the_length_is_ever_made(make):
    model, n = make("qwen2"), 512
    ids = torch.randint(4, 20, (1, n), generator=torch.Generator().manual_seed(0))
    with Largest() as few, attention_rows(model, [-1, -2], lambda *_: None):
        model.module(input_ids=ids, use_cache=False, logits_to_keep=1)
    with Largest() as all_, attention_rows(model, range(n), lambda *_: None):
        model.module(input_ids=ids, use_cache=False, logits_to_keep=1)
    assert few.size < n * n / 4 and all_.size >= 4 * n * n


@torch.no_grad()
def test_everything_is_as_before_after_a_pass_after_an_error_and_after_nesting(make):
    model = make("llama")
    before = (dict(ALL_ATTENTION_FUNCTIONS), model.module.config.to_dict(), model.module.config._attn_implementation)
    rows_of(model, [0], input_ids=IDS)
    with pytest.raises(KeyError), attention_rows(model, [0], lambda *_: None):
        raise KeyError
    with ablating(model, [(0, 1)]):
        inside = dict(ALL_ATTENTION_FUNCTIONS)
        rows_of(model, [0], input_ids=IDS)
        assert dict(ALL_ATTENTION_FUNCTIONS) == inside
    after = (dict(ALL_ATTENTION_FUNCTIONS), model.module.config.to_dict(), model.module.config._attn_implementation)
    assert after == before
    assert not model.blocks[0]._forward_hooks


@torch.no_grad()
def test_another_model_is_left_alone(make):
    model, bystander = make("llama"), make("gpt2")
    bystander.module.set_attn_implementation("eager")
    model.module.set_attn_implementation("eager")
    plain, seen = bystander.module(input_ids=IDS).logits, []
    with ablating(model, [(0, 0)]), attention_rows(model, [0], lambda layer, _: seen.append(layer)):
        model.module(input_ids=IDS)
        first = len(seen)
        assert torch.equal(bystander.module(input_ids=IDS).logits, plain)
    assert first == len(seen) == len(model.blocks)


@torch.no_grad()
def test_the_inner_block_sees_a_layers_attention_first(make):
    model, seen = make("llama"), {}
    with attention_rows(model, [5], seen.__setitem__), ablating(model, [(1, 2)]):
        model.module(input_ids=IDS)
    np.testing.assert_allclose(seen[1][:, 2, 0, :6], 1 / 6, atol=1e-6)
    assert (seen[1][:, 1, 0, :6] - 1 / 6).abs().max() > 0.05


@torch.no_grad()
def test_a_pass_that_is_stopped_early_is_no_failure(make):
    model, seen = make("llama"), []
    stop = watching({1: model.blocks[1]}, lambda *_: None, stop=True)
    with attention_rows(model, [0], lambda layer, _: seen.append(layer)), stop:
        model.module(input_ids=IDS)
    assert seen == [0, 1]


@torch.no_grad()
def test_an_adapter_on_top_is_no_obstacle(make):
    model = make("llama")
    whole = eager(model, input_ids=IDS)
    adapted = get_peft_model(copy.deepcopy(model.module), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    seen, _ = rows_of(Model(adapted.eval(), model.tokenizer), [7], input_ids=IDS)
    for layer, attention in enumerate(whole):
        np.testing.assert_allclose(seen[layer], attention[:, :, [7]], atol=1e-5)


def test_a_model_without_the_interface_is_refused(words):
    config = AutoConfig.for_model("bloom", vocab_size=20, hidden_size=16, n_layer=2, n_head=2)
    model = Model(AutoModelForCausalLM.from_config(config).eval(), words)
    for block in (attention_rows(model, [0], lambda *_: None), ablating(model, [(0, 0)])):
        with pytest.raises(InputError, match="BloomForCausalLM does not use transformers' attention interface"), block:
            model.module(input_ids=IDS)
    with attention_rows(model, [0], lambda *_: None):
        pass  # nothing was run, so nothing was missed


def without_head(model: Model, layer: int, head: int, kind: str, mean: torch.Tensor | None = None) -> Model:
    """The same ablation, done to a copy's weights."""
    own = Model(copy.deepcopy(model.module), model.tokenizer)
    part = slice(8 * head, 8 * head + 8)
    block = own.blocks[layer]
    if hasattr(block, "self_attn"):
        queries, out = block.self_attn.q_proj.weight[part], block.self_attn.o_proj
        to_out = out.weight[:, part]
    else:  # GPT-2 keeps query, key and value in one transposed matrix, with biases
        queries, out = block.attn.c_attn.weight[:, part], block.attn.c_proj
        block.attn.c_attn.bias[part] = 0 if kind == "uniform" else block.attn.c_attn.bias[part]
        to_out = out.weight[part].T
    if kind == "uniform":
        queries.zero_()
        return own
    if mean is not None:
        added = to_out @ mean.float()
        out.bias = torch.nn.Parameter(added if out.bias is None else out.bias + added, requires_grad=False)
    to_out.zero_()
    return own


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["uniform", "zero", "mean"])
@torch.no_grad()
def test_ablation_equals_a_model_whose_weights_were_edited(make, kind, how):
    model = make(kind)
    means = mean_outputs(model, IDS.tolist())
    with ablating(model, [(1, 3)], how, means=means if how == "mean" else None):
        found = model.module(input_ids=IDS).logits
    wanted = without_head(model, 1, 3, how, means[1][3] if how == "mean" else None).module(input_ids=IDS).logits
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert (found - model.module(input_ids=IDS).logits).abs().max() > 0.01


@torch.no_grad()
def test_no_heads_and_no_places_change_nothing(make):
    model = make("llama")
    plain = model.module(input_ids=IDS).logits
    for heads, positions in (([], None), ([(0, 1), (2, 3)], [])):
        with ablating(model, heads, "zero", positions=positions):
            assert torch.equal(model.module(input_ids=IDS).logits, plain)


@pytest.mark.parametrize("how", ["uniform", "zero"])
@torch.no_grad()
def test_places_in_one_pass_equal_ablated_steps_after_a_plain_prefill(make, how):
    """The published phase: the prompt is read with every head, the answer is said without some."""
    model, heads = make("llama"), [(0, 1), (1, 0), (3, 2)]
    with ablating(model, heads, how, positions=range(7, 12)):
        whole = model.module(input_ids=IDS).logits[:, 7:]
    cache = model.module(input_ids=IDS[:, :7], use_cache=True).past_key_values
    with ablating(model, heads, how):
        steps = model.module(input_ids=IDS[:, 7:], past_key_values=cache, use_cache=True).logits
    np.testing.assert_allclose(whole, steps, atol=1e-5)
    with ablating(model, heads, how, positions=[-1]):
        cache = model.module(input_ids=IDS[:, :8], use_cache=True).past_key_values
        one = model.module(input_ids=IDS[:, 8:9], past_key_values=cache).logits
    np.testing.assert_allclose(one[:, 0], whole[:, 1], atol=1e-5)


@torch.no_grad()
def test_mean_outputs_are_what_enters_the_output_matrix(make):
    model, seen = make("llama"), []
    handle = model.blocks[2].self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    means = mean_outputs(model, [IDS[0].tolist(), IDS[1, :5].tolist()])
    handle.remove()
    slow = np.concatenate([x[0].numpy() for x in seen]).reshape(17, 4, 8).mean(0)
    np.testing.assert_allclose(means[2], slow, atol=1e-6)
    assert means.keys() == {0, 1, 2, 3}


def test_bad_input_is_told_in_one_line(make):
    model = make("llama")
    cases = {
        "unknown ablation 'off'; use uniform, zero, mean": lambda: ablating(model, [(0, 0)], "off"),
        "there is no layer 4; the model has layers 0 to 3": lambda: ablating(model, [(4, 0)]),
        "there is no head 4 in layer 1; it has heads 0 to 3": lambda: ablating(model, [(1, 4)]),
        "position 12 is not in a pass of 12 tokens": lambda: ablating(model, [(0, 0)], positions=[12]),
        "position -13 is not in a pass of 12 tokens": lambda: attention_rows(model, [-13], lambda *_: None),
        "ablation 'mean' needs means=": lambda: ablating(model, [(0, 0)], "mean", means={1: torch.zeros(4, 8)}),
    }
    for told, block in cases.items():
        with pytest.raises(InputError) as error, block():
            model.module(input_ids=IDS)
        assert str(error.value).startswith(told) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="no tokens"):
        mean_outputs(model, [])
