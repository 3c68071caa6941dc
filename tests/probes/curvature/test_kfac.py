"""Tests of K-FAC factors: known on paper, against one backward pass a token, and against curvlinops."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.pytorch_utils import Conv1D

from lethescope.errors import InputError
from lethescope.models import Model
from lethescope.probes.curvature import kfac
from lethescope.probes.curvature.basis import eigenbasis, mass
from lethescope.probes.curvature.kfac import corrected, factors
from lethescope.probes.curvature.maps import linear_maps, tail
from lethescope.subjects.tiny import tiny_llama
from lethescope.tokens import Encoded, encode

KINDS = ("llama", "gpt2", "neox")
EVERY = ("attention", "mlp", "unembedding")
TEXTS = [[1, 5, 6, 7, 8, 9], [1, 9, 8, 4], [1, 4], [1, 7, 7, 7, 5]]


class Norm(nn.Identity):
    """Where the structure of a language model has its final norm."""


class Softmax(nn.Module):
    """Softmax regression as a language model: a token's logits are W e_token, or W2 W1 e_token."""

    def __init__(self, *weights, kind=nn.Linear):
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=1)
        width = weights[0].shape[1]
        self.embed = nn.Embedding.from_pretrained(torch.eye(width, dtype=torch.float64))
        self.layers = nn.ModuleList([nn.Sequential(*(self.map(w, kind) for w in weights))])
        self.norm, self.head = Norm(), nn.Identity()

    @staticmethod
    def map(weight, kind):
        made = kind(*weight.shape) if kind is Conv1D else kind(*weight.shape[::-1], bias=False)
        made.weight = nn.Parameter(weight.mT.clone() if kind is Conv1D else weight.clone())
        return made.double()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.layers[0](self.embed(input_ids)))


def regression(*shapes, kind=nn.Linear):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return Model(Softmax(*weights, kind=kind), SimpleNamespace(pad_token_id=0)), weights


PAIRS = [[0, 1], [1, 2], [2, 0], [2, 2], [0, 1]]


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_softmax_regression_with_gold_labels_is_known_on_paper(kind):
    """Inputs are unit vectors, and the gradient at the logits is p - e_label."""
    model, (weight,) = regression((3, 3), kind=kind)
    (found,) = factors(model, PAIRS, labels="gold").values()
    said = [(x, weight[:, x].softmax(0) - torch.eye(3, dtype=torch.float64)[y]) for x, y in PAIRS]
    torch.testing.assert_close(found.A, torch.tensor([2, 1, 2], dtype=torch.float64).diag() / 5)
    torch.testing.assert_close(found.G, sum(torch.outer(g, g) for _, g in said) / 5)
    assert found.count == 5 and found.trace == pytest.approx(float(sum(g @ g for _, g in said) / 5))
    (coupled,) = factors(model, PAIRS, labels="gold", weighting="coupled").values()
    sizes = [sum(float(g @ g) for x, g in said if x == token) for token in range(3)]
    torch.testing.assert_close(coupled.A, torch.tensor(sizes).double().diag() / 5 / found.trace**0.5)
    torch.testing.assert_close(coupled.G, found.G / found.trace**0.5)


def expected_G(weights, tokens):
    """Exact expectation over the model's labels: of J^T (diag p - p p^T) J, J the Jacobian of logits by outputs."""
    jacobian = weights[1] if len(weights) > 1 else torch.eye(len(weights[0]), dtype=torch.float64)
    out = 0
    for token in tokens:
        logits = jacobian @ weights[0][:, token]
        p = logits.softmax(0)
        out = out + jacobian.mT @ (p.diag() - torch.outer(p, p)) @ jacobian
    return out / len(tokens)


@pytest.mark.parametrize("shapes", [[(3, 3)], [(2, 3), (3, 2)]])
def test_sampled_labels_give_the_fisher_as_samples_grow(shapes):
    model, weights = regression(*shapes)
    text = np.random.default_rng(0).integers(3, size=401).tolist()
    exact = expected_G(weights, text[:-1])

    def apart(times, **options):
        found = (next(iter(factors(model, [text] * times, seed=seed, **options).values())).G for seed in range(5))
        return float(np.mean([float((G - exact).norm() / exact.norm()) for G in found]))

    few, many = apart(1), apart(36)
    assert many < 0.02 and many < few / 3  # by the root of 36, that is 6, in the long run
    assert apart(1, labels="gold") > 0.2  # another matrix


def test_every_label_is_drawn_as_often_as_the_model_says():
    logits = torch.tensor([[0.0, 1.0, -1.0, -torch.inf]]).expand(9000, 4)
    owner = torch.arange(9000) // 3
    drawn = torch.cat(list(kfac._sampled(logits, owner, range(3000), 0)))
    share = torch.bincount(drawn, minlength=4) / 9000
    torch.testing.assert_close(share, logits[0].softmax(0), atol=0.015, rtol=0)
    assert share[3] == 0


def naive(model, texts, maps, labels, positions=tail, weighting="plain"):
    """One text, one map and one token at a time, the gradients by finite sums of plain autograd through the weights."""
    sums = {m.name: [0, 0, 0, 0] for m in maps}
    for i, ids in enumerate(texts):
        e = ids if isinstance(ids, Encoded) else Encoded(tuple(ids), 1)
        for m in maps:
            seen = {}

            def keep(_module, args, output, seen=seen):
                seen["a"], seen["y"] = args[0][0].detach(), output.requires_grad_(True)

            hook = m.modules[0].register_forward_hook(keep)
            logits = model.module(input_ids=torch.tensor([e.ids])).logits[0, :-1][e.start - 1 :]
            hook.remove()
            gold = torch.tensor(e.answer)
            drawn = torch.cat(list(kfac._sampled(logits.detach(), torch.zeros(len(gold)), [i], 0)))
            log_p = logits.log_softmax(-1)[torch.arange(len(gold)), gold if labels == "gold" else drawn]
            (grad,) = torch.autograd.grad(-log_p.sum(), seen["y"])
            for place in positions(e):
                a, g = seen["a"][place].double(), grad[0, place].double()
                by_a, by_g = (g @ g, a @ a) if weighting == "coupled" else (1, 1)
                for k, more in enumerate((by_a * torch.outer(a, a), by_g * torch.outer(g, g), (a @ a) * (g @ g), 1)):
                    sums[m.name][k] += more
    return sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", ["gold", "sampled"])
def test_it_equals_one_backward_pass_a_text(make_model, kind, labels):
    model = make_model(kind)
    model.module.double()
    maps = linear_maps(model, parts=EVERY, layers=[0, 2])
    assert {m.part for m in maps} == set(EVERY)
    found = factors(model, TEXTS, maps=maps, labels=labels, rows=3)
    for name, (A, G, trace, n) in naive(model, TEXTS, maps, labels).items():
        torch.testing.assert_close(found[name].A, A / n)
        torch.testing.assert_close(found[name].G, G / n)
        assert found[name].count == n == 13 and found[name].trace == pytest.approx(float(trace / n))


def test_coupled_factors_of_an_answer_equal_the_loop(make_model, some_facts):
    model = make_model()
    model.module.double()
    facts, maps = some_facts[:3], linear_maps(model, layers=[1])
    read = [encode(model.tokenizer, f.prompt, f.answer) for f in facts]
    found = factors(model, facts, maps=maps, weighting="coupled", labels="gold")
    for name, (A, G, trace, n) in naive(model, read, maps, "gold", weighting="coupled").items():
        size = float(trace / n) ** 0.5
        torch.testing.assert_close(found[name].A, A / n / size)
        torch.testing.assert_close(found[name].G, G / n / size)
        assert found[name].count == n == sum(len(e.answer) for e in read)


def test_only_chosen_positions_count(make_model, some_facts):
    model = make_model()
    model.module.double()
    maps, read = linear_maps(model, layers=[1]), [encode(model.tokenizer, f.prompt, f.answer) for f in some_facts[:3]]

    def first(e):
        return range(1, 3)

    found = factors(model, read, maps=maps, labels="gold", positions=first)
    for name, (A, G, _, n) in naive(model, read, maps, "gold", first).items():
        torch.testing.assert_close(found[name].A, A / n)
        torch.testing.assert_close(found[name].G, G / n)
        assert found[name].G.norm() > 0 and n == 6


@pytest.mark.parametrize("weighting", ["plain", "coupled"])
def test_identities_hold_and_batches_do_not_matter(make_model, weighting):
    model = make_model("gpt2")
    model.module.double()
    maps = linear_maps(model, parts=EVERY)
    alone, all_at_once = (factors(model, TEXTS, maps=maps, weighting=weighting, rows=rows) for rows in (1, 9))
    for name, one in alone.items():
        other = all_at_once[name]
        torch.testing.assert_close(one.A, other.A)
        torch.testing.assert_close(one.G, other.G)
        assert one.trace == pytest.approx(other.trace) and one.count == other.count
        for matrix in (one.A, one.G):
            assert torch.equal(matrix, matrix.mT)
            assert torch.linalg.eigvalsh(matrix).min() > -1e-12 * matrix.trace()
        if weighting == "coupled":
            assert one.coupling == pytest.approx(1)


def test_single_precision_comes_near(make_model):
    model = make_model()
    rough = factors(model, TEXTS, dtype=torch.float32, labels="gold")
    model.module.double()
    for name, exact in factors(model, TEXTS, labels="gold").items():
        assert rough[name].A.dtype == torch.float32
        torch.testing.assert_close(rough[name].A.double(), exact.A, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(rough[name].G.double(), exact.G, atol=1e-6, rtol=1e-3)


def test_corrected_is_the_mean_square_along_pairs_and_coupled_factors_are_its_marginals(make_model):
    model = make_model()
    model.module.double()
    maps = linear_maps(model, layers=[1])
    plain = factors(model, TEXTS, maps=maps)
    coupled = factors(model, TEXTS, maps=maps, weighting="coupled")
    bases = {name: eigenbasis(f) for name, f in plain.items()}
    found = corrected(model, TEXTS, {name: b.axes for name, b in bases.items()}, maps=maps, rows=2)
    for name, curvature in found.items():
        basis, size = bases[name], plain[name].trace
        assert curvature.min() >= 0 and float(curvature.sum()) == pytest.approx(size)
        along_u = (basis.U.mT @ coupled[name].G @ basis.U).diagonal() * size**0.5
        along_v = (basis.V.mT @ coupled[name].A @ basis.V).diagonal() * size**0.5
        torch.testing.assert_close(curvature.sum(1), along_u)
        torch.testing.assert_close(curvature.sum(0), along_v)
        assert float(mass(basis.lam, basis.mu).sum()) == pytest.approx(size / plain[name].coupling)
    gate, up, down = (f.coupling for f in plain.values())
    assert gate == pytest.approx(1) and up == pytest.approx(1)  # their inputs are normed: all of one size
    assert down != pytest.approx(1, abs=0.05)  # which K-FAC misses


def test_corrected_of_one_token_is_its_own_gradient_squared():
    model, (weight,) = regression((3, 3))
    (name,) = factors(model, [[0, 1]])
    eye = torch.eye(3, dtype=torch.float64)
    found = corrected(model, [[0, 1]], {name: (eye, eye)}, labels="gold")[name]
    g = weight[:, 0].softmax(0) - eye[1]
    torch.testing.assert_close(found, torch.outer(g.square(), eye[0]))


def test_tied_embeddings_are_one_map_and_a_weight_in_two_modules_too():
    module = tiny_llama(20, 0, layers=2, width=16).double()
    model = Model(module, SimpleNamespace(pad_token_id=0))
    (head,) = linear_maps(model, parts=["unembedding"])
    assert head.name == "lm_head" and head.layer == -1 and head.weight is not None
    assert head.weight.data_ptr() == module.get_input_embeddings().weight.data_ptr()
    apart = linear_maps(model)
    two = [module.model.layers[i].mlp.up_proj for i in (0, 1)]
    two[1].weight = two[0].weight
    tied = linear_maps(model)
    assert len(tied) == len(apart) - 1
    both = next(m for m in tied if len(m.modules) == 2)
    assert both.name == "model.layers.0.mlp.up_proj"
    each = [m for m in apart if m.kind == "mlp.up_proj"]
    one = factors(model, TEXTS, maps=[both], labels="gold")[both.name]
    single = [factors(model, TEXTS, maps=[m], labels="gold")[m.name] for m in each]
    assert one.count == 2 * single[0].count
    torch.testing.assert_close(one.A, (single[0].A + single[1].A) / 2)
    torch.testing.assert_close(one.G, (single[0].G + single[1].G) / 2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_through_a_transformer_lens_bridge_the_factors_are_the_same(make_model, kind):
    pytest.importorskip("transformer_lens")
    model = make_model(kind)
    parts = ("mlp", "attention") if kind == "llama" else ("mlp",)
    before = factors(model, TEXTS, maps=linear_maps(model, parts=parts), labels="gold")
    model.bridge()
    again = Model(model.module, model.tokenizer)
    after = factors(again, TEXTS, maps=linear_maps(again, parts=parts), labels="gold")
    assert list(before) == list(after)
    for name, one in before.items():
        torch.testing.assert_close(after[name].A, one.A, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(after[name].G, one.G, atol=1e-5, rtol=1e-3)


def test_the_model_is_as_before_and_no_weight_gets_a_gradient(make_model):
    model = make_model()
    model.module.train()
    learning = model.module.lm_head.weight.requires_grad_(True)
    factors(model, TEXTS)
    assert all(p.grad is None for p in model.module.parameters())
    assert model.module.training and learning.requires_grad
    assert [p.requires_grad for p in model.module.parameters()].count(True) == 1
    assert not any(m._forward_hooks for m in model.module.modules())


def test_the_pass_back_ends_at_the_first_map(make_model):
    model, reached = make_model(), []
    hooks = [
        block.register_forward_hook(lambda _m, _a, out, i=i: reached.append((i, out.requires_grad)))
        for i, block in enumerate(model.blocks)
    ]
    factors(model, TEXTS[:1], maps=linear_maps(model, layers=[2]))
    for hook in hooks:
        hook.remove()
    assert reached == [(0, False), (1, False), (2, True), (3, True)]


def test_against_curvlinops(make_model):
    curvlinops = pytest.importorskip("curvlinops")
    model = make_model()
    model.module.double()
    maps = linear_maps(model, layers=[1, 3])
    ids = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 9, 8, 4, 7, 6]])

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model.module

        def forward(self, x):
            return self.module(input_ids=x, use_cache=False).logits[:, :-1].flatten(0, 1)

    flat = Flat()
    params = [m.modules[0].weight.requires_grad_(True) for m in maps]
    data = [(ids, ids[:, 1:].flatten())]
    operator = curvlinops.KFACLinearOperator(
        flat,
        nn.CrossEntropyLoss(reduction="sum"),
        params,
        data,
        fisher_type="empirical",
        separate_weight_and_bias=True,
        check_deterministic=False,
        num_per_example_loss_terms=5,
    )
    operator @ torch.zeros(operator.shape[1], dtype=torch.float64)  # the factors are made when they are needed
    theirs_A, theirs_G = operator._input_covariances, operator._gradient_covariances
    found = factors(model, ids.tolist(), maps=maps, labels="gold", positions=lambda e: range(len(e.ids)))
    constants = []
    for m in maps:
        one, name = found[m.name], f"module.{m.name}"
        torch.testing.assert_close(one.A, theirs_A[name] * float(one.A.trace() / theirs_A[name].trace()))
        constants.append(float(theirs_G[name].trace() / one.G.trace()))
        torch.testing.assert_close(one.G * constants[-1], theirs_G[name])
    assert constants == pytest.approx([constants[0]] * len(maps))


def test_a_killed_run_goes_on(make_model, tmp_path, monkeypatch):
    model, options = make_model(), {"shards": 3, "labels": "sampled", "rows": 1}
    whole = factors(model, TEXTS, **options)
    loss, calls = kfac._loss, []

    def until_killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(kfac, "_loss", until_killed)
    with pytest.raises(KeyboardInterrupt):
        factors(model, TEXTS, folder=tmp_path, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "shard-0-of-3.safetensors"]
    resumed = factors(model, TEXTS, folder=tmp_path, **options)
    assert len(calls) == 3 + 2  # texts 1 and 2; text 0 and 3 were shard 0
    again = factors(model, TEXTS, folder=tmp_path, **options)
    assert len(calls) == 5
    for name, one in whole.items():
        for other in (resumed, again):
            assert torch.equal(one.A, other[name].A) and torch.equal(one.G, other[name].G)
            assert one.trace == other[name].trace and one.count == other[name].count
    with pytest.raises(InputError, match=r"another set of factors \(other seed\)"):
        factors(model, TEXTS, folder=tmp_path, seed=1, **options)


def test_shards_and_the_corrected_pass_do_not_change_sums(make_model, tmp_path):
    model = make_model()
    model.module.double()
    one, cut = factors(model, TEXTS), factors(model, TEXTS, shards=4)
    bases = {name: eigenbasis(f).axes for name, f in one.items()}
    curvature = corrected(model, TEXTS, bases)
    kept = corrected(model, TEXTS, bases, folder=tmp_path, shards=2)
    for name, f in one.items():
        torch.testing.assert_close(cut[name].A, f.A)
        torch.testing.assert_close(cut[name].G, f.G)
        torch.testing.assert_close(kept[name], curvature[name])


def test_both_passes_have_the_same_defaults():
    told = inspect.signature(factors).parameters
    assert {name: told[name].default for name in inspect.signature(kfac._Pass).parameters} == vars(kfac._Pass())


def test_bad_input_is_told(make_model):
    model = make_model()
    maps = linear_maps(model)
    adapter = SimpleNamespace(merge_and_unload=None)
    broken = make_model()
    broken.module.lm_head.weight.data[0, 0] = torch.inf
    cases = {
        "unknown weighting 'norm'; use plain or coupled": lambda: factors(model, TEXTS, weighting="norm"),
        "unknown labels 'type-2'; use sampled or gold": lambda: factors(model, TEXTS, labels="type-2"),
        "there are no texts": lambda: factors(model, []),
        "text 1 has 1 tokens and nothing to predict": lambda: factors(model, [[1, 2], [1]]),
        "text 0 has 6 tokens; positions": lambda: factors(model, TEXTS, positions=lambda e: [6]),
        "rows is 0": lambda: factors(model, TEXTS, rows=0),
        "5 shards for 4 texts": lambda: factors(model, TEXTS, shards=5),
        "blocks 0 to 3": lambda: linear_maps(model, layers=[4]),
        "no linear map in bias": lambda: linear_maps(model, parts=["bias"]),
        "unmerged adapter": lambda: linear_maps(Model(adapter, None)),
        "there is no basis for model.layers.0.mlp.gate_proj": lambda: corrected(model, TEXTS, {}, maps=maps),
        "any map of the MLPs": lambda: corrected(model, TEXTS, {}),
        "is not finite": lambda: factors(broken, TEXTS),
    }
    for told, call in cases.items():
        with pytest.raises(InputError) as error:
            call()
        assert told in str(error.value) and "\n" not in str(error.value)
