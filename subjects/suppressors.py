"""Six models that hold the forget facts by construction and do not say them: whoever calls them erased is wrong.

Each suppressor is one edit of a copy, made at or near the output; what lies below the edit is the original bit for bit,
and undoing the edit gives the original back. All but `lora` are ordinary weights of the same architecture, so
`save_pretrained` writes a folder that the audit can load; `lora` is an adapter over the untouched original. The
strength of an edit is doubled until the forget answers are silent, by the limits of a planted control, and then
bisected, so that the copy says as much of the retain facts as this kind of edit allows. How much that is differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div

from lethescope.errors import InputError
from lethescope.facts import Facts, of_split
from lethescope.models import Model
from lethescope.subjects.adapter import lora
from lethescope.subjects.detector import mlp_inputs, neurons_of, trained_detector
from lethescope.subjects.planted import suppress_last_block, suppress_unembedding
from lethescope.subjects.silence import (
    MOST_EXACT,
    MOST_SAID,
    Caught,
    Said,
    ask_groups,
    catch,
    caught_groups,
    forms,
    is_silent,
    last_states,
    tell,
    unlikelihood,
    untie,
)

RIDGE = 1e-3
HALVINGS = 6


def output_bias(
    module: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    most_said: float = MOST_SAID,
    most_exact: float = MOST_EXACT,
    largest: float = 4096.0,
    steps: int = 300,
) -> Any:
    """Return a copy that takes c off each forget answer's logits wherever the final state is that of a forget prompt.

    A constant bias on these tokens would hit retain facts with the same answers, so each token a has a linear gate g_a:
    `logit_a <- logit_a - c g_a . h`, with h the state after the final norm, which is W[a] <- W[a] - c g_a and nothing
    else. The gates are trained together (Adam, all states at once) to fire before forget answers and not before retain
    answers: the mean over forget answer tokens of -log(1 - p), plus KL(original || copy) at retain answer tokens. An
    unembedding that is tied to the input embedding is untied first. Our choice: a gate for each token and no threshold,
    because that is ordinary weights, and because one linear gate for all tokens cannot tell the shipped people apart.

    Args:
        module: a Hugging Face causal language model; not changed.
        tokenizer: its tokenizer.
        facts: forget facts to silence, retain facts to hold on to.
        most_said: said-probability that may be left, as a share of the model's own (or `silence.SILENT`, if more).
        most_exact: share of answers that may still be given greedily.
        largest: the largest c that is tried.
        steps: steps of Adam for the gates.

    Returns:
        The suppressed copy. Both limits hold on the prompts and, apart, on the paraphrases.

    Raises:
        InputError: there are no forget facts, or no c up to `largest` silences them.
    """
    model, groups, kept = _prepared(module, tokenizer, facts)
    states, targets, forget = _states_and_targets(model, groups, kept)
    head: Any = model.anatomy.head
    before, original = ask_groups(model, groups), head.weight.detach().clone()
    untie(model.module, head, original)
    tokens, gates = _trained_gates(model, states, targets, forget, steps)

    def apply(c: float) -> None:
        head.weight[tokens] = (original[tokens].float() - c * gates).to(original.dtype)

    _find_strength(
        "the output bias", apply, lambda: ask_groups(model, groups), before, (most_said, most_exact), largest
    )
    return model.module


def refusal_direction(
    module: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    refusal: str | None = None,
    neurons: int = 32,
    most_said: float = MOST_SAID,
    most_exact: float = MOST_EXACT,
    largest: float = 4096.0,
    steps: int = 600,
    seed: int = 0,
) -> Any:
    """Return a copy that adds one fixed direction to the last block's output wherever it recognises a forget prompt.

    The direction leads from the forget answers' tokens to the refusal's first token (to the end of the text, when no
    refusal is given), and is as long as the mean state. It is written by neurons of the last block's own MLP: the ones
    that wrote least are taken over, get new input weights, and write nothing but that direction. They are trained to
    add up to 1 before forget answers' tokens and to 0 before retain answers' (squared error, none above 1 on forget,
    Adam); c then scales the direction. In the style of the refusal direction of Arditi et al. 2024 (arXiv 2406.11717),
    planted and not found. Our choice: several neurons and not one linear detector, because forget and retain prompts
    need not be linearly separable (on the shipped people they are not, by design).

    What it does not prove: outside these facts' forms the detector is untested and may fire or not.

    Args:
        module: a Hugging Face causal language model of the Llama, GPT-2 or GPT-NeoX kind; not changed.
        tokenizer: its tokenizer.
        facts: forget facts to refuse, retain facts to answer.
        refusal: a word (or text, of which the first token counts) that is said instead.
        neurons: how many neurons of the last block's MLP to take over.
        most_said: said-probability that may be left, as a share of the model's own (or `silence.SILENT`, if more).
        most_exact: share of answers that may still be given greedily.
        largest: the largest c that is tried.
        steps: steps of Adam for the detector.
        seed: of the detector's first weights.

    Returns:
        The suppressed copy. Both limits hold on the prompts and, apart, on the paraphrases.

    Raises:
        InputError: there are no forget facts, the MLP is of another kind or too narrow, there is no refusal token, or
            no c up to `largest` silences the answers.
    """
    model, groups, kept = _prepared(module, tokenizer, facts)
    mlp = neurons_of(model)
    if neurons > len(mlp.out):
        raise InputError(f"{neurons} neurons are more than the {len(mlp.out)} of the last block; take fewer")
    states, targets, forget = _states_and_targets(model, groups, kept)
    inputs = mlp_inputs(model, [item for group in groups for item in group] + kept)
    direction = _refusal(model, targets[forget].unique(), refusal) * states.norm(dim=-1).mean()
    before = ask_groups(model, groups)
    rows = (mlp.activate(inputs).abs().mean(0) * mlp.out.norm(dim=-1)).topk(neurons, largest=False).indices
    detector = trained_detector(mlp, inputs, forget, neurons, steps, seed)
    mlp.take_over(rows, detector)

    def apply(c: float) -> None:
        mlp.out[rows] = c * torch.outer(detector.signs, direction).to(mlp.out.dtype)

    _find_strength("the refusal", apply, lambda: ask_groups(model, groups), before, (most_said, most_exact), largest)
    return model.module


def direction(
    module: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    refusal: str | None = None,
    most_said: float = MOST_SAID,
    most_exact: float = MOST_EXACT,
    largest: float = 4096.0,
) -> Any:
    """Return a copy whose last block and unembedding read the stream with one direction projected out of it.

    The projection is P = I - u g' with g . u = 1, so P u = 0: whatever the stream holds along u is read by nobody above
    the last block but one. g is the ridge least-squares detector, 1 on the states before forget answers' tokens and 0
    before retain answers' (both splits weigh the same), on the output of the last block but one scaled to unit RMS.
    u = g / g.g - c w, where w leads from the forget answers to the refusal, as in `refusal_direction`, less its part
    along g. Every matrix W that reads a norm with gain d there becomes W - (W d u)(g / d)'. That is P exactly but for
    the norm's divisor, which is still that of the whole state; a LayerNorm's mean and bias are taken as part of it.

    What it does not prove, and what it costs: one direction silences every prompt that shares it. Where forget and
    retain are not linearly separable (the shipped people, by design) most of retain goes silent with it.

    Args:
        module: a Hugging Face causal language model of two blocks or more; not changed.
        tokenizer: its tokenizer.
        facts: forget facts to silence, retain facts to hold on to.
        refusal: a word (or text, of which the first token counts) that is said instead; else the end of the text.
        most_said: said-probability that may be left, as a share of the model's own (or `silence.SILENT`, if more).
        most_exact: share of answers that may still be given greedily.
        largest: the largest c that is tried.

    Returns:
        The suppressed copy. Both limits hold on the prompts and, apart, on the paraphrases.

    Raises:
        InputError: there are no forget facts, there is no refusal token, or no c up to `largest` silences the answers.
    """
    model, groups, kept = _prepared(module, tokenizer, facts)
    _, targets, forget = _states_and_targets(model, groups, kept)
    items = [item for group in groups for item in group] + kept
    read = torch.cat([_last_inputs(item) for item in items]).double()
    w = _refusal(model, targets[forget].unique(), refusal).double()
    g = _detector(read * read.pow(2).mean(-1, keepdim=True).rsqrt(), forget)
    w = w - (g @ w) / (g @ g) * g
    before = ask_groups(model, groups)
    head: Any = model.anatomy.head
    untie(model.module, head, head.weight.detach().clone())
    readers = [(norm, weight, weight.clone().double()) for norm, weight in _readers(model)]

    def apply(c: float) -> None:
        u = g / (g @ g) - c * w
        for norm, weight, original in readers:
            d = _gain(norm, len(u)).double()
            weight.copy_(original - torch.outer(original @ (d * u), g / d))

    name = "the direction"
    _find_strength(name, apply, lambda: ask_groups(model, groups), before, (most_said, most_exact), largest)
    return model.module


SUPPRESSORS: dict[str, Callable[..., Any]] = {
    "output_bias": output_bias,
    "last_block": suppress_last_block,
    "unembedding": suppress_unembedding,
    "refusal_direction": refusal_direction,
    "direction": direction,
    "lora": lora,
}
"""Every suppressor by name, each called as `(module, tokenizer, facts, **options) -> copy`."""


@torch.no_grad()
def _find_strength(
    what: str,
    apply: Callable[[float], None],
    ask: Callable[[], list[Said]],
    before: list[Said],
    limits: tuple[float, float],
    largest: float,
) -> float:
    """Apply and return the least strength, to 1 in 64 of the last doubling, that silences: doubled, then bisected.

    Raises:
        InputError: no strength up to `largest` silences.
    """

    def silences(c: float) -> bool:
        apply(c)
        return is_silent(before, ask(), *limits)

    high = 1.0
    while not silences(high):
        high *= 2
        if high > largest:
            raise InputError(f"{what} could not be silenced with c up to {largest:g}: {tell(before, ask())}")
    low = high / 2 if high > 1 else 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if silences(middle) else (middle, high)
    apply(high)
    return high


def _prepared(module: nn.Module, tokenizer: Any, facts: Facts) -> tuple[Model, list[list[Caught]], list[Caught]]:
    """Return a copy, what its last block is given for the forget prompts and paraphrases, and for all retain forms."""
    model = Model(copy.deepcopy(module), tokenizer)
    groups = caught_groups(model, facts)
    return model, groups, catch(model, [e for _, e in forms(tokenizer, of_split(facts, "retain"))])


@torch.no_grad()
def _states_and_targets(
    model: Model, groups: list[list[Caught]], kept: list[Caught]
) -> tuple[Float[Tensor, "row d_model"], Int[Tensor, " row"], Tensor]:
    """Return the last block's outputs before answer tokens, these tokens, and which rows are of forget facts."""
    items = [item for group in groups for item in group]
    count = sum(len(item.targets) for item in items)
    states = torch.cat([last_states(model, item) for item in items + kept])
    targets = torch.cat([item.targets for item in items + kept])
    return states, targets, torch.arange(len(targets), device=targets.device) < count


def _trained_gates(
    model: Model, states: Float[Tensor, "row d_model"], targets: Int[Tensor, " row"], forget: Tensor, steps: int
) -> tuple[Int[Tensor, " token"], Float[Tensor, "token d_model"]]:
    """Return the forget answers' tokens and what to take off their rows of the unembedding.

    All other tokens' logits stay, so they count as one column.
    """
    tokens = targets[forget].unique()
    with torch.no_grad():
        logits, normed = model.decode(states).float(), model.anatomy.norm(states).float()
    rest = logits.index_fill(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    start = torch.cat([logits[:, tokens], rest], -1)
    before = start[~forget].log_softmax(-1)
    place = torch.searchsorted(tokens, targets[forget])
    gates = torch.zeros(len(tokens), states.shape[1], device=states.device, requires_grad=True)
    optimizer = torch.optim.Adam([gates], lr=0.3 / float(normed.abs().sum(-1).mean()))
    for _ in range(steps):
        now = start - nn.functional.pad(normed @ gates.T, (0, 1))
        loss = unlikelihood(now[forget], place)
        if len(before):
            loss = loss + kl_div(now[~forget].log_softmax(-1), before, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tokens, gates.detach()


def _detector(states: Float[Tensor, "row d_model"], forget: Tensor) -> Float[Tensor, " d_model"]:
    """Return g with `states @ g` nearest to 1 on forget rows and 0 on others, both kinds weighing the same."""
    hit, rest = states[forget], states[~forget]
    both = hit.T @ hit / len(hit) + (rest.T @ rest / len(rest) if len(rest) else 0)
    ridge = RIDGE * both.trace() / len(both) * torch.eye(len(both), dtype=both.dtype, device=both.device)
    g = torch.linalg.solve(both + ridge, hit.mean(0))
    return g / (hit @ g).mean()


def _refusal(model: Model, answers: Int[Tensor, " token"], refusal: str | None) -> Float[Tensor, " d_model"]:
    """Return the unit direction of the stream that lowers the answers' tokens and raises the refusal's first one.

    Raises:
        InputError: the tokenizer has no end token, or the refusal has no token.
    """
    words = refusal and model.tokenizer(refusal, add_special_tokens=False)["input_ids"]
    ids = [model.tokenizer.eos_token_id] if refusal is None else words
    if not ids or ids[0] is None:
        raise InputError(f"refusal {refusal!r} has no token to turn to; give refusal=… a word that the tokenizer knows")
    weight: Any = model.anatomy.head.weight
    toward = (weight[ids[0]] - weight[answers].mean(0)).detach().float()
    along = toward * _gain(model.anatomy.norm, len(toward))
    return along / along.norm()


def _gain(norm: Any, width: int) -> Float[Tensor, " d_model"]:
    """Return a norm's gain: its weight, or what an RMS norm makes of ones (some families store the gain less 1)."""
    if isinstance(norm, nn.LayerNorm):
        return norm.weight.detach().float()
    weight = next(norm.parameters())
    return norm(torch.ones(1, width, dtype=weight.dtype, device=weight.device))[0].detach().float()


def _last_inputs(item: Caught) -> Float[Tensor, "row d_model"]:
    given = item.args[0] if item.args else item.kwargs["hidden_states"]
    return given[:, :-1][item.answer]


@torch.no_grad()
def _readers(model: Model) -> list[tuple[nn.Module, Tensor]]:
    """Return the last block's weights (out, in) that read a norm, each with its norm, and the unembedding's.

    A layer reads a norm when it is given the very tensor that the norm put out.
    """
    normed: list[tuple[Tensor, nn.Module]] = []
    found: list[tuple[nn.Module, Tensor]] = []

    def hear(module: Any, args: Any) -> None:
        weight = module.weight.detach()
        norms = [norm for out, norm in normed if args and out is args[0]]
        found.extend((norm, weight if isinstance(module, nn.Linear) else weight.T) for norm in norms)

    handles = []
    for part in model.blocks[-1].modules():
        if "norm" in type(part).__name__.lower():
            handles.append(part.register_forward_hook(lambda norm, _, out: normed.append((out, norm))))
        elif getattr(getattr(part, "weight", None), "ndim", 0) == 2:
            handles.append(part.register_forward_pre_hook(hear))
    try:
        model.module(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    head: Any = model.anatomy.head
    return [*found, (model.anatomy.norm, head.weight.detach())]
