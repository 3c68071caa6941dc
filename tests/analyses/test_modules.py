"""Tests of the places of weights: each has one, on three architectures; what is hung there comes off again."""

import copy

import pytest
import torch

from lethescope.analyses import modules
from lethescope.errors import InputError
from lethescope.models import fingerprint

KINDS = ("llama", "gpt2", "neox")
ATTENTION = {"llama": "self_attn", "gpt2": "attn", "neox": "attention"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_one_place(make_model, kind):
    model = make_model(kind)
    placed = modules.weights(model.module)
    names = {".".join(owner) for owner in placed}
    assert names == {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
    by_row = {w.row for w in placed.values()}
    assert by_row == {"embedding", "final norm", "unembedding", *(f"block {i}" for i in range(len(model.blocks)))}
    for owner, at in placed.items():
        parts = ".".join(owner).split(".")
        want = "attention" if ATTENTION[kind] in parts else "mlp" if "mlp" in parts else "norms"
        assert at.part == (want if at.layer >= 0 else at.row), owner
        assert (at.layer >= 0) == (f"block {at.layer}" == at.row)
        assert at.outputs_first != (kind == "gpt2" and parts[-2].startswith("c_"))


def test_other_weights_hang_for_a_while_only_and_a_tied_one_at_the_place_named(make_model):
    model, other = make_model("gpt2"), make_model("gpt2", seed=1)  # GPT-2 ties its embeddings
    before = fingerprint(model.module)
    head = ("lm_head", "weight")
    ids = torch.arange(3, 8)[None]
    embedded = model.module.transformer.wte(ids)
    with modules.holding(model.module, {head: modules.parameter(other.module, head)}):
        assert torch.equal(model.module.lm_head.weight, other.module.lm_head.weight)
        assert torch.equal(model.module.transformer.wte(ids), embedded)
    assert fingerprint(model.module) == before
    assert model.module.lm_head.weight is model.module.transformer.wte.weight
    values = {o: modules.parameter(other.module, o) for o in modules.weights(model.module)}
    with pytest.raises(RuntimeError, match="full"), modules.holding(model.module, values):
        assert torch.equal(model.module(ids).logits, other.module(ids).logits)
        raise RuntimeError("full")
    assert fingerprint(model.module) == before


def test_what_cannot_be_hung_leaves_the_model_as_it_was(make_model):
    model = make_model()
    before = fingerprint(model.module)
    owners = list(modules.weights(model.module))[:2]
    with pytest.raises(AttributeError), modules.holding(model.module, {owners[0]: torch.zeros(1), owners[1]: None}):
        pass
    assert fingerprint(model.module) == before


def test_models_of_other_architectures_are_refused_by_the_weight(make_model):
    llama = make_model().module
    with pytest.raises(InputError, match=r"weight .* only; two models of one architecture"):
        modules.aligned(llama, make_model("neox").module)
    wide = copy.deepcopy(llama)
    wide.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 96, bias=False)
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight is \(64, 32\) in the original and \(96, 32\)"):
        modules.aligned(llama, wide)
