import numpy as np
import pytest
import torch

from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.models import anatomy
from lethescope.subjects.silence import said
from lethescope.subjects.tiny import _skipped, tiny_llama, train


def test_shape_and_tied_embeddings():
    model = tiny_llama(244, 0)
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 1e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_key_value_heads == 2 and not model.training


def test_seed_decides_the_weights_and_the_global_state_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, same, other = tiny_llama(20, 0), tiny_llama(20, 0), tiny_llama(20, 1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_training_teaches_and_repeats_bit_for_bit(toy):
    sentences = ["Ada was born in Velmora.", "Boris plays the oboe."]
    weights = []
    for _ in range(2):
        model = tiny_llama(len(toy.tokenizer), 0, layers=1, width=16, heads=2, kv_heads=1)
        train(model, toy.tokenizer, sentences, epochs=3, batch_size=2, seed=4, progress=False)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_taught_model_knows_its_facts(taught, toy):
    assert said(taught.model, taught.tokenizer, of_split(taught.facts, "forget")).exact == 1


def test_order_follows_the_seed(toy):
    losses = []
    for seed in (0, 1):
        model = tiny_llama(len(toy.tokenizer), 0, layers=1, width=16, heads=2, kv_heads=1)
        texts = [fact.prompt for fact in toy.facts]
        train(model, toy.tokenizer, texts, epochs=1, batch_size=4, seed=seed, progress=False)
        losses.append(model.lm_head.weight.detach().clone())
    assert not torch.equal(*losses)


def test_no_sentences_are_refused(toy):
    with pytest.raises(InputError, match="no sentences"):
        train(toy.model, toy.tokenizer, [])


def test_the_last_block_is_skipped_most_often_and_the_first_never(toy):
    blocks = anatomy(toy.model).blocks
    drawn = _skipped(blocks, 0.5, np.random.default_rng(0))
    counts = np.zeros(len(blocks))
    for _ in range(400):
        skipped = next(drawn)
        counts += [block in skipped for block in blocks]
    assert counts[0] == 0
    assert 150 < counts[-1] < 250
