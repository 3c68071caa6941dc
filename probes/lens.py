"""Channel *lens*: the answer read from the middle of the model by its own, and by the original's, unembedding."""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from lethescope import measurement
from lethescope.channel import Channel, every_budget
from lethescope.facts import Fact
from lethescope.hooks import capturing
from lethescope.models import Model
from lethescope.scoring import candidates, tails


@torch.no_grad()
def measure(model: Model, facts: Sequence[Fact], *, original: Model | None = None, seed: int = 0) -> xr.Dataset:
    """Read every candidate with the logit lens after every block, twice: own decoder and the original's (frozen).

    `log p_l = log softmax(W_U norm(h_l))` at the positions that predict the answer, mean over its tokens; W_U and norm
    are the model's own, then the original's (nostalgebraist 2020; frozen decoder as in arXiv 2605.24614). An edit of
    the unembedding blinds the own decoder only. A fact that a lens cannot read may still be there, written in
    directions that no unembedding looks at; a lens over-claims erasure.

    Args:
        model: any language model.
        facts: forget and control facts.
        original: the model whose decoder is the frozen one; none, or one with another vocabulary: own decoder only.
        seed: not used.

    Returns:
        `score(fact, candidate, place)` in nats; places are `own block l` and `frozen block l`, with coordinates
        `layer` and `decoder`.
    """
    asked = candidates(model.tokenizer, facts)
    decoders = {"own": model}
    if original is not None and original.shape[1:] == model.shape[1:]:
        decoders["frozen"] = original
    alike = len(decoders) == 2 and _decode_alike(*decoders.values())
    layers = len(model.blocks)
    found = np.full((len(asked.encoded), len(decoders), layers), np.nan)
    for batch in tails(model, asked.encoded):
        with capturing(model.blocks, stop=True) as seen:
            batch.run(model)
        for layer, h in seen.items():
            for d, decoder in enumerate([model] if alike else decoders.values()):
                found[batch.rows, d, layer] = batch.mean_log_prob(decoder.decode(h)).cpu().numpy()
    if alike:
        found[:, 1] = found[:, 0]
    names = [(name, layer) for name in decoders for layer in range(layers)]
    return measurement.from_scores(
        asked.table(found.reshape(len(found), -1)),
        facts,
        [f"{name} block {layer}" for name, layer in names],
        place_coords={"layer": [layer for _, layer in names], "decoder": [name for name, _ in names]},
    )


def _decode_alike(model: Model, original: Model) -> bool:
    """Whether two models have the same final norm and unembedding: then one decoding is enough."""
    one, other = (
        [*m.anatomy.norm.state_dict().values(), *m.anatomy.head.state_dict().values()] for m in (model, original)
    )
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


CHANNEL = Channel(
    name="lens",
    measure=measure,
    version=1,
    scale="preference",
    citation="nostalgebraist 2020 (logit lens); arXiv 2605.24614 (frozen decoder)",
    budgets=every_budget(),
    sees_original=True,
)
