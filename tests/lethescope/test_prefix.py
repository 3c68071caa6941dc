"""Tests of shared beginnings: a pass that goes on from kept keys equals the whole one, and the kept keys stay."""

from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from lethescope.prefix import Read, common, every_key, selected

KINDS = ("llama", "gpt2", "neox")
IDS = [[1, 7, 9, 4, 11, 6], [1, 3, 5, 8, 2, 10]]
FEW = st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=1, max_size=4)


@torch.no_grad()
def run(module: Any, ids: list[list[int]], cache: Any = None) -> Any:
    return module(input_ids=torch.tensor(ids), past_key_values=cache, use_cache=True)


@given(FEW)
def test_what_is_common_equals_a_loop(sequences: list[list[int]]) -> None:
    alike = next(n for n in count() if n == min(map(len, sequences)) or len({s[n] for s in sequences}) > 1)
    assert common(*sequences) == alike


@pytest.mark.parametrize("kind", KINDS)
def test_selected_rows_go_on_as_whole_passes_and_leave_the_cache_alone(make_model: Any, kind: str) -> None:
    module = make_model(kind).module
    cache = run(module, [row[:4] for row in IDS]).past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    for rows in ([1, 0, 0], [0]):  # the second call sees what the first has left
        logits = run(module, [IDS[row][4:] for row in rows], selected(cache, rows)).logits
        for row, found in zip(rows, logits, strict=True):
            torch.testing.assert_close(found, run(module, [IDS[row]]).logits[0, 4:], rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 4
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


def test_nothing_is_copied_before_rows_are_taken(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = run(make_model().module, IDS).past_key_values
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", lambda *_: pytest.fail("a tensor was copied"))
    own = selected(cache, [1])
    assert [layer.keys.shape[0] for layer in own.layers] == [1] * len(own.layers)
    assert selected(None, [0]) is None


@pytest.fixture(scope="module")
def window() -> Any:
    """A model that sees four tokens back."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        return MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=4)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_cache_has_every_key(make_model: Any, kind: str) -> None:
    cache = run(make_model(kind).module, IDS).past_key_values
    assert every_key(cache, 6) is cache
    assert every_key(cache, 7) is None


def test_a_window_and_no_cache_have_not(window: Any) -> None:
    assert every_key(run(window, IDS).past_key_values, 6) is None
    assert every_key(run(window, [[1, 2]]).past_key_values, 2) is None  # nor will it, after more tokens
    assert every_key(None, 0) is None


@pytest.mark.parametrize("kind", KINDS)
def test_one_goes_on_from_what_was_read(make_model: Any, kind: str) -> None:
    module, read = make_model(kind).module, Read()
    first, other, third = [1, 7, 9, 4, 11], [1, 7, 9, 3, 2, 6], [2, 7]
    for ids, most, left in ((first, 9, 0), (other, 9, 3), (other, 5, 5), (other, 2, 2), (third, 9, 0)):
        known = read.back(ids, most)
        assert (known, list(read.ids)) == (left, ids[:left])
        out = run(module, [ids[known:]], read.cache)
        read.keep(ids, out.past_key_values)
        torch.testing.assert_close(out.logits, run(module, [ids]).logits[:, known:], rtol=0, atol=1e-5)
    assert read.ids == third


def test_where_keys_are_lost_nothing_is_read(window: Any) -> None:
    read = Read()
    read.keep(IDS[0], run(window, IDS[:1]).past_key_values)
    assert read == Read() and read.back(IDS[0], 9) == 0
