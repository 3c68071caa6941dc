"""Tests of channel *lens*: the last block is the model itself, and the frozen decoder is the original's."""

import numpy as np
import pytest
import torch

from lethescope.facts import of_split
from lethescope.models import Model
from lethescope.probes import lens
from lethescope.subjects.tokenizer import fact_tokenizer
from lethescope.tokens import encode


@pytest.fixture(scope="module")
def asked(some_facts):
    return of_split(some_facts, "forget")[:4] + of_split(some_facts, "control")[:2]


def of_decoder(ds, name):
    return ds["score"].where(ds["decoder"] == name, drop=True).transpose("fact", "candidate", "place").values


@torch.no_grad()
def slow_lens(model, decoder, fact, answer):
    """Every hidden state of one plain pass, decoded one position at a time."""
    e = encode(model.tokenizer, fact.prompt, answer)
    states: list[torch.Tensor] = []
    hooks = [
        b.register_forward_hook(lambda _m, _a, out: states.append(out if torch.is_tensor(out) else out[0]))
        for b in model.blocks
    ]
    model.module(input_ids=torch.tensor([e.ids]))
    for hook in hooks:
        hook.remove()
    read = []
    for h in states:
        seen = [decoder.anatomy.head(decoder.anatomy.norm(h[0, i - 1])) for i in range(e.start, len(e.ids))]
        chosen = [logits.log_softmax(-1)[t].item() for logits, t in zip(seen, e.answer, strict=True)]
        read.append(np.mean(chosen))
    return read


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_it_equals_a_lens_that_looks_at_one_position_at_a_time(make_model, asked, kind):
    original, model = make_model(kind), make_model(kind, seed=1)
    ds = lens.measure(model, asked, original=original)
    assert ds["layer"].values.tolist() == [*range(len(model.blocks))] * 2
    for name, decoder in (("own", model), ("frozen", original)):
        found = of_decoder(ds, name)
        for i, fact in enumerate(asked):
            for k, answer in enumerate((fact.answer, *fact.alternatives)):
                np.testing.assert_allclose(found[i, k], slow_lens(model, decoder, fact, answer), atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@torch.no_grad()
def test_the_last_block_through_its_own_decoder_is_what_the_model_says(make_model, asked, kind):
    model = make_model(kind)
    found = of_decoder(lens.measure(model, asked), "own")[:, :, -1]
    for i, fact in enumerate(asked):
        for k, answer in enumerate((fact.answer, *fact.alternatives)):
            e = encode(model.tokenizer, fact.prompt, answer)
            log_p = model.module(input_ids=torch.tensor([e.ids])).logits[0].log_softmax(-1)
            said = np.mean([log_p[j - 1, e.ids[j]].item() for j in range(e.start, len(e.ids))])
            assert found[i, k] == pytest.approx(said, abs=1e-4)


def test_on_the_original_the_frozen_decoder_is_its_own(make_model, asked):
    model = make_model()
    ds = lens.measure(model, asked, original=model)
    np.testing.assert_array_equal(of_decoder(ds, "frozen"), of_decoder(ds, "own"))


def test_an_edited_unembedding_blinds_the_own_decoder_only(make_model, asked):
    original, model = make_model("neox"), make_model("neox")  # its unembedding is not tied to the embedding
    with torch.no_grad():
        model.anatomy.head.weight.zero_()
    ds, before = lens.measure(model, asked, original=original), lens.measure(original, asked, original=original)
    np.testing.assert_allclose(of_decoder(ds, "own"), -np.log(len(model.tokenizer)), atol=1e-5)
    np.testing.assert_array_equal(of_decoder(ds, "frozen"), of_decoder(before, "frozen"))


def test_without_a_common_decoder_there_is_only_the_models_own(make_model, asked):
    model, original = make_model("llama"), make_model("llama", seed=1)
    others = fact_tokenizer(tuple(f.model_copy(update={"prompt": f"Truly {f.prompt}"}) for f in asked))
    for decoder in (None, Model(original.module, others)):
        ds = lens.measure(model, asked, original=decoder)
        assert ds["place"].values.tolist() == [f"own block {layer}" for layer in range(len(model.blocks))]
