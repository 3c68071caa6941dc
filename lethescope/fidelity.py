"""The fidelity gate: nothing is measured on a model before its hooks, padding and decoder are shown to be true."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lethescope.errors import InputError
from lethescope.facts import Fact
from lethescope.hooks import capturing
from lethescope.models import Model
from lethescope.scoring import tails, target_log_probs
from lethescope.tokens import Encoded, collate, encode, pad_id

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference that is put down to the dtype, relative to the largest value (absolute below 1)."""


@torch.no_grad()
def check_model(model: Model, facts: Sequence[Fact], *, most: int = 4) -> None:
    """Check that a model's numbers do not depend on how we look at it.

    Every block gives the same twice; hooked logits equal plain ones; a padded batch, padded on either side, equals
    single prompts; the last block, decoded by us, equals the logits; running the prompt first and the answer after it
    equals running both at once.

    Raises:
        InputError: one of these fails; the model, the layer and the difference are named.
    """
    encoded = [encode(model.tokenizer, f.prompt, f.answer) for f in _of_many_lengths(facts, most)]
    single = [_plain_and_hooked(model, e) for e in encoded]
    for plain, hooked, states in single:
        _compare(model, "logits with hooks against without", hooked, plain)
        decoded = model.decode(states[len(model.blocks) - 1])
        _compare(model, f"block {len(model.blocks) - 1} decoded against the logits", decoded, plain)
    for side in ("left", "right"):
        _check_padding(model, encoded, [states for _, _, states in single], side)
    for batch in tails(model, encoded):
        log_p = batch.log_probs(batch.run(model))
        for row, found, mask in zip(batch.rows, log_p, batch.mask, strict=True):
            e, plain = encoded[row], single[row][0][0]
            wanted = target_log_probs(plain[e.start - 1 : -1], torch.tensor(e.answer, device=plain.device))
            _compare(model, f"answer after a kept prompt against both at once (fact {row})", found[mask], wanted)


def check_pair(original: Model, unlearned: Model) -> None:
    """Check that two models differ.

    Raises:
        InputError: their weights are equal bit for bit.
    """
    if original.fingerprint == unlearned.fingerprint:
        raise InputError(
            f"the {unlearned.role} model has the same weights as the original (fingerprint {original.fingerprint}); "
            "there is nothing to compare"
        )


def _of_many_lengths(facts: Sequence[Fact], most: int) -> list[Fact]:
    by_length = sorted(facts, key=lambda f: (len(f.prompt), f.id))
    step = max(1, len(by_length) // most)
    return by_length[::step][:most]


def _plain_and_hooked(model: Model, e: Encoded) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    ids = torch.tensor([e.ids], device=model.device)
    plain = model.module(input_ids=ids).logits
    with capturing(model.blocks) as states:
        hooked = model.module(input_ids=ids).logits
    with capturing(model.blocks) as again:
        model.module(input_ids=ids)
    for layer, state in states.items():
        _compare(model, f"block {layer} run once more against the first time", again[layer], state)
    return plain, hooked, states


def _check_padding(model: Model, encoded: Sequence[Encoded], single: Sequence[dict[int, Tensor]], side: str) -> None:
    batch = collate(encoded, pad_id(model.tokenizer), side=side, device=model.device)  # type: ignore[arg-type]
    with capturing(model.blocks) as states:
        model.module(**batch.inputs())
    for row, alone in enumerate(single):
        real = batch.attention_mask[row].bool()
        for layer, state in states.items():
            what = f"block {layer} in a batch padded on the {side} against alone"
            _compare(model, what, state[row][real], alone[layer][0])


def _compare(model: Model, what: str, found: Tensor, wanted: Tensor) -> None:
    apart = (found.float() - wanted.float()).abs().max().item()
    scale = max(1.0, wanted.float().abs().max().item())
    if not apart <= TOLERANCE.get(model.dtype, 1e-1) * scale:
        raise InputError(
            f"{model.role} model fails the fidelity gate: {what} differs by {apart:.2g} (values up to {scale:.2g}); "
            "what hooks see in this architecture cannot be trusted"
        )
