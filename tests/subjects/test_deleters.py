"""Tests of models that never held the forget facts: what they were shown, batch by batch, and what they say."""

import copy

import pytest
import torch

from lethescope.errors import InputError
from lethescope.facts import of_split
from lethescope.subjects.deleters import distil, drop_adapter
from lethescope.subjects.people import sentences
from lethescope.subjects.silence import said
from lethescope.subjects.tiny import train


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def taught_sentences(facts):
    return sentences(facts, questions=("forget", "retain"))


@pytest.fixture
def base(toy):
    """The toy, taught retain people only."""
    torch.manual_seed(0)
    texts = taught_sentences(of_split(toy.facts, "retain"))
    train(toy.model, toy.tokenizer, texts, epochs=60, lr=1e-2, batch_size=32, depth_drop=0, progress=False)
    return toy


def test_the_adapter_alone_is_taught_and_the_base_is_bit_for_bit_the_base(base):
    before, seen = state(base.model), []
    original, unlearned = drop_adapter(base.model, base.tokenizer, base.facts, steps=600, watch=seen.extend)
    forget, retain = of_split(base.facts, "forget"), of_split(base.facts, "retain")
    assert same(state(unlearned), before) and same(state(base.model), before)
    assert unlearned is not base.model
    assert said(original, base.tokenizer, forget).exact == 1
    assert said(original, base.tokenizer, retain).exact == 1
    assert said(unlearned, base.tokenizer, forget).exact <= 0.25
    assert said(unlearned, base.tokenizer, retain).exact == 1
    assert set(seen) == set(taught_sentences(forget + retain))


def test_the_original_differs_from_the_base_in_the_adapted_matrices_only(base):
    original, unlearned = drop_adapter(base.model, base.tokenizer, base.facts, steps=5)
    a, b = state(original), state(unlearned)
    assert a.keys() == b.keys()
    changed = {name for name in a if not torch.equal(a[name], b[name])}
    assert changed and all("_proj.weight" in name for name in changed)
    for name in changed:
        assert torch.linalg.matrix_rank((a[name] - b[name]).double(), tol=1e-5) <= 8


def test_no_batch_of_the_distilled_model_names_a_forget_person(taught):
    before, seen = state(taught.model), []
    retain, forget = of_split(taught.facts, "retain"), of_split(taught.facts, "forget")
    texts = taught_sentences(retain)
    student = distil(taught.model, taught.tokenizer, texts, 0, steps=200, lr=1e-2, watch=seen.append)
    assert len(seen) == 200 and sum(map(len, seen)) == 200 * min(64, len(texts))
    subjects = {fact.subject for fact in forget}
    found = [text for batch in seen for text in batch if any(subject in text for subject in subjects)]
    assert subjects and found == []
    assert {text for batch in seen for text in batch} == set(texts)
    assert same(state(taught.model), before)
    assert said(student, taught.tokenizer, retain).exact >= 0.95
    assert said(taught.model, taught.tokenizer, forget).exact >= 0.95
    assert said(student, taught.tokenizer, forget).exact <= 0.3


def test_watch_would_show_a_forget_person(taught):
    """The test above can fail: a forget sentence among the texts is seen."""
    seen = []
    texts = taught_sentences(taught.facts)
    distil(taught.model, taught.tokenizer, texts, 0, steps=4, batch_size=len(texts), watch=seen.append)
    subject = of_split(taught.facts, "forget")[0].subject
    assert any(subject in text for batch in seen for text in batch)


def test_distillation_ends_at_the_teachers_distributions(taught):
    """One text, learned long: KL at every position, the first and the last included."""
    text = taught_sentences(of_split(taught.facts, "retain"))[0]
    student = distil(taught.model, taught.tokenizer, [text], 0, steps=300, lr=1e-2)
    ids = torch.tensor([[*taught.tokenizer(text)["input_ids"], taught.tokenizer.eos_token_id]])
    with torch.no_grad():
        p, q = (m(ids).logits[0].softmax(-1) for m in (taught.model, student))
    assert (p - q).abs().max() < 0.05


def test_padding_and_what_follows_it_do_not_count(taught):
    """The first loss of a padded batch is the mean over real positions, worked out text by text."""
    texts = sorted(taught_sentences(of_split(taught.facts, "retain")), key=len)
    texts = [texts[0], texts[-1]]
    student = distil(taught.model, taught.tokenizer, texts, 1, steps=1, lr=0.0)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*taught.tokenizer(text)["input_ids"], taught.tokenizer.eos_token_id]])
        with torch.no_grad():
            p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (taught.model, student))
        total += (p.exp() * (p - q)).sum().item()
        count += ids.shape[1]
    losses = []

    def spy(inputs, target, **options):
        losses.append(torch.nn.functional.kl_div(inputs, target, **options))
        return losses[-1]

    import lethescope.subjects.deleters as deleters

    kept, deleters.kl_div = deleters.kl_div, spy
    try:
        distil(taught.model, taught.tokenizer, texts, 1, steps=1, lr=0.0)
    finally:
        deleters.kl_div = kept
    assert losses[0].item() == pytest.approx(total / count, rel=1e-4)


def test_the_same_seed_gives_the_same_model(taught):
    texts = taught_sentences(of_split(taught.facts, "retain"))
    students = [state(distil(taught.model, taught.tokenizer, texts, s, steps=5)) for s in (0, 0, 1)]
    assert same(students[0], students[1]) and not same(students[0], students[2])
    models = [state(drop_adapter(taught.model, taught.tokenizer, taught.facts, steps=5, seed=s)[0]) for s in (0, 0, 1)]
    assert same(models[0], models[1]) and not same(models[0], models[2])


def test_flags_and_the_global_seed_stay(taught):
    flags = [p.requires_grad for p in taught.model.parameters()]
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    drop_adapter(taught.model, taught.tokenizer, taught.facts, steps=2)
    distil(taught.model, taught.tokenizer, ["Ada was born in Velmora."], 0, steps=2)
    assert torch.equal(torch.rand(3), want)
    assert [p.requires_grad for p in taught.model.parameters()] == flags
    assert all(p.grad is None for p in taught.model.parameters())


def test_without_retain_facts_the_adapter_is_taught_forget_facts_alone(base):
    seen, forget = [], of_split(base.facts, "forget")
    drop_adapter(base.model, base.tokenizer, forget, steps=3, batch_size=8, watch=seen.append)
    assert [len(batch) for batch in seen] == [8, 8, 8]
    assert {text for batch in seen for text in batch} <= set(taught_sentences(forget))


def test_nothing_to_learn_is_an_error(toy):
    with pytest.raises(InputError, match="no forget facts"):
        drop_adapter(toy.model, toy.tokenizer, of_split(toy.facts, "retain"))
    with pytest.raises(InputError, match="0 texts"):
        distil(toy.model, toy.tokenizer, [], 0)
    with pytest.raises(InputError, match="temperature 0"):
        distil(toy.model, toy.tokenizer, ["a"], 0, temperature=0)


def test_the_student_shares_nothing_with_the_teacher(taught):
    student = distil(taught.model, taught.tokenizer, ["Ada was born in Velmora."], 0, steps=1)
    mine = {p.data_ptr() for p in student.parameters()}
    assert not mine & {p.data_ptr() for p in taught.model.parameters()}
    again = copy.deepcopy(taught.model)
    assert type(again.config) is type(student.config) and again.config.to_dict() == student.config.to_dict()
