"""K-FAC: the curvature of a population's loss in the weights of a linear map, as two small matrices.

For `y = W x` the curvature of the mean loss of a token is near `G (x) A`, where A is the second moment of the inputs x
and G that of the loss gradients at the outputs y (Martens & Grosse 2015, arXiv 1503.05671). With labels sampled from
the model it is the curvature of the true Fisher, that is, of the generalised Gauss-Newton matrix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lethescope.errors import InputError
from lethescope.measurement import replacing
from lethescope.models import Model
from lethescope.probes.curvature.maps import (
    LinearMap,
    Passage,
    Positions,
    Rows,
    Text,
    batches,
    digest,
    digest_of,
    linear_maps,
    passages,
    rows_of,
    still,
    watching,
)
from lethescope.runs import claim
from lethescope.statistics import seeded

Labels = Literal["sampled", "gold"]
Weighting = Literal["plain", "coupled"]
Sums = dict[str, Tensor]
Reduce = Callable[[str, Tensor, Tensor], Sums]
"""What becomes of the rows of a map in a batch, inputs (row q) and gradients (row p): tensors that are summed."""


@dataclass(frozen=True)
class Factors:
    """The two factors of a linear map's curvature, `G (x) A`, per token of the population.

    Attributes:
        name: the map.
        A: (q, q), of the inputs.
        G: (p, p), of the gradients at the outputs.
        count: number of tokens.
        trace: mean of `|x|^2 |g|^2`: the trace of the matrix that `G (x) A` stands for.
    """

    name: str
    A: Float[Tensor, "q q"]
    G: Float[Tensor, "p p"]
    count: int
    trace: float

    @property
    def coupling(self) -> float:
        """`trace / (tr A tr G)`: how far plain factors misjudge the size; 1 for coupled ones.

        Also 1 where all inputs have one size, as after an RMSNorm of equal gains: so for `gate` and `up`, not `down`.
        """
        return self.trace / float(self.A.trace() * self.G.trace())


def factors(
    model: Model,
    texts: Sequence[Text],
    *,
    maps: Sequence[LinearMap] | None = None,
    weighting: Weighting = "plain",
    labels: Labels = "sampled",
    positions: Positions | None = None,
    seed: int = 0,
    rows: int = 8,
    dtype: torch.dtype = torch.float64,
    folder: Path | None = None,
    shards: int = 1,
) -> dict[str, Factors]:
    """Sum up the K-FAC factors of linear maps over a population of texts.

    - `plain`: `A = mean x x^T`, `G = mean g g^T`, g the gradient of a text's *summed* loss, so that neither depends on
      how texts are batched (Merullo et al. 2025, arXiv 2510.24256, take a mean over the batch);
    - `coupled`: `A = mean |g|^2 x x^T / sqrt(trace)`, `G = mean |x|^2 g g^T / sqrt(trace)`. Then `tr A tr G` is the
      trace, and the marginals are those of EK-FAC; plain factors miss that large inputs and large gradients meet.

    What it does not prove: a map, or a direction in it, with little curvature is one that little depends on *to first
    order in the Fisher*, over these texts. Surely known tokens have tiny gradients: low curvature is not "not stored".

    Args:
        model: any language model, adapters merged. Its weights get no gradients and are as before afterwards.
        texts: strings, token ids, facts (the loss is that of the answer) or `Encoded`.
        maps: what `linear_maps` finds; by default the MLPs of all blocks.
        weighting: `plain` or `coupled`.
        labels: `sampled` from the model (Fisher), or `gold`, the text's own next tokens (empirical Fisher).
        positions: text -> positions whose inputs and gradients count; by default those that predict a label.
        seed: of the labels; text i draws the same whatever it is batched with. A text given twice draws twice.
        rows: texts at a time.
        dtype: of the sums; products are taken in float32, or in float64 if the model is.
        folder: keeps the sums of finished shards, so that a killed run goes on where it stood.
        shards: into how many parts the texts are cut.

    Returns:
        name of the map -> its `Factors`, in `dtype`. Units of A: squared activation; of G: squared nats per squared
        output.

    Raises:
        InputError: an option is unknown, a text is too short, a map is not reached, a loss or a sum is not finite, or
            the folder holds other factors.

    Example:
        >>> from lethescope.subjects.handmade import handmade
        >>> made = handmade()
        >>> found = factors(made.original, made.facts[:4], maps=linear_maps(made.original, layers=[1]))
        >>> {name.rpartition(".")[2]: (f.G.shape[0], f.A.shape[0], f.count) for name, f in found.items()}
        {'gate_proj': (48, 80, 4), 'up_proj': (48, 80, 4), 'down_proj': (80, 48, 4)}
    """
    if weighting not in get_args(Weighting):
        raise InputError(f"unknown weighting {weighting!r}; use {' or '.join(get_args(Weighting))}")
    how = _Pass(labels, positions, seed, rows, dtype, folder, shards)
    sums = how.over(model, texts, maps, _Moments(weighting), {"weighting": weighting})
    return {name: _factors(name, s, weighting) for name, s in sums.items()}


class _Moments:
    """Second moments of a map's inputs and gradients in a batch.

    Maps that share their input (gate and up; query, key and value) come one after another and share its moment.
    """

    def __init__(self, weighting: Weighting) -> None:
        self.weighting = weighting
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, _name: str, a: Float[Tensor, "row q"], g: Float[Tensor, "row p"]) -> Sums:
        a2, g2 = a.square().sum(-1), g.square().sum(-1)
        if self.weighting == "coupled":
            return {"A": (g2[:, None] * a).mT @ a, "G": (a2[:, None] * g).mT @ g, "trace": a2 @ g2}
        if self._last is None or self._last[0] is not a:
            self._last = a, a.mT @ a
        return {"A": self._last[1], "G": g.mT @ g, "trace": a2 @ g2}


def _factors(name: str, sums: Mapping[str, Tensor], weighting: Weighting) -> Factors:
    count, trace = int(sums["count"]), float(sums["trace"] / sums["count"])
    scale = count * trace**0.5 if weighting == "coupled" and trace else count
    A, G = ((s + s.mT) / (2 * scale) for s in (sums["A"], sums["G"]))
    return Factors(name, A, G, count, trace)


def corrected(
    model: Model,
    texts: Sequence[Text],
    bases: Mapping[str, tuple[Float[Tensor, "p p"], Float[Tensor, "q q"]]],
    *,
    maps: Sequence[LinearMap] | None = None,
    **options: Any,
) -> dict[str, Float[Tensor, "p q"]]:
    """Measure the curvature along every pair of eigenvectors: EK-FAC (George et al. 2018, arXiv 1806.03884).

    `mean over tokens of (u_i^T g)^2 (v_j^T x)^2`, in place of the product of eigenvalues that K-FAC takes it for. Needs
    a second pass over texts. Use it, or coupled factors, wherever the size of a curvature is told and not its order
    alone. What it does not prove: see `factors`; and the pairs stay those of K-FAC, so what lies between them is lost.

    Args:
        model: the model of the factors.
        texts: as for `factors`.
        bases: name of a map -> U (p, p) and V (q, q), eigenvectors of G and A as columns: `Basis.axes`.
        maps: by default the MLP maps that `bases` names.
        options: those of `factors`, from `labels` on; the folder is one of its own.

    Returns:
        name of the map -> (p q), each at least 0; their sum is the `trace` of factors of the same texts and seed.

    Raises:
        InputError: a map has no basis, or as for `factors`.
    """
    chosen = [m for m in linear_maps(model) if m.name in bases] if maps is None else maps
    missing = [m.name for m in chosen if m.name not in bases]
    if missing or not chosen:
        raise InputError(f"there is no basis for {missing[0] if missing else 'any map of the MLPs'}; give U and V")

    def along(name: str, a: Float[Tensor, "row q"], g: Float[Tensor, "row p"]) -> Sums:
        u, v = (axes.to(x) for axes, x in zip(bases[name], (g, a), strict=True))
        return {"curvature": (g @ u).square().mT @ (a @ v).square()}

    how = _Pass(**options)
    told = {"bases": digest_of(t for m in chosen for t in bases[m.name]) if how.folder else ""}
    return {name: s["curvature"] / s["count"] for name, s in how.over(model, texts, chosen, along, told).items()}


@dataclass(frozen=True)
class _Pass:
    """How texts are run: a forward and a backward pass to the outputs of the maps, and what is kept on disk."""

    labels: Labels = "sampled"
    positions: Positions | None = None
    seed: int = 0
    rows: int = 8
    dtype: torch.dtype = torch.float64
    folder: Path | None = None
    shards: int = 1

    def over(
        self,
        model: Model,
        texts: Sequence[Text],
        maps: Sequence[LinearMap] | None,
        reduce: Reduce,
        told: Mapping[str, Any],
    ) -> dict[str, Sums]:
        """Sum what `reduce` makes of the rows of every map, shard by shard, in their order.

        Raises:
            InputError: as for `factors`.
        """
        if self.labels not in get_args(Labels):
            raise InputError(f"unknown labels {self.labels!r}; use {' or '.join(get_args(Labels))}")
        chosen = linear_maps(model) if maps is None else tuple(maps)
        read = dict(enumerate(passages(model.tokenizer, texts, self.positions)))
        if not 1 <= self.shards <= len(read):
            raise InputError(f"{self.shards} shards for {len(read)} texts; give 1 to {len(read)}")
        if self.folder is not None:
            claim(self.folder, self._manifest(model, list(read.values()), chosen, told), "set of factors")
        total: Sums = {}
        for shard in range(self.shards):
            some = {i: e for i, e in read.items() if i % self.shards == shard}
            _add(total, self._kept(shard, model, partial(self._shard, model, some, chosen, reduce)))
        _check(total, chosen)
        return {
            m.name: {k.rpartition("/")[2]: t for k, t in total.items() if k.startswith(f"{m.name}/")} for m in chosen
        }

    def _manifest(
        self, model: Model, read: Sequence[Passage], maps: Sequence[LinearMap], told: Mapping[str, Any]
    ) -> dict[str, Any]:
        kept = {"labels": self.labels, "seed": self.seed, "dtype": str(self.dtype), "shards": self.shards, **told}
        return {"model": model.fingerprint, "texts": digest(read), "maps": [m.name for m in maps], **kept}

    def _kept(self, shard: int, model: Model, compute: Callable[[], Sums]) -> Sums:
        """Return a shard's sums from disk, or compute them and put them there, whole or not at all."""
        if self.folder is None:
            return compute()
        path = self.folder / f"shard-{shard}-of-{self.shards}.safetensors"
        if not path.is_file():
            found = {name: t.cpu().contiguous() for name, t in compute().items()}
            with replacing(path) as temporary:
                save_file(found, temporary)
        return load_file(path, device=str(model.device))

    def _shard(self, model: Model, texts: Mapping[int, Passage], maps: Sequence[LinearMap], reduce: Reduce) -> Sums:
        total: Sums = {}

        def see(name: str, a: Tensor, g: Tensor) -> None:
            count = torch.tensor(len(a), dtype=self.dtype, device=a.device)
            _add(total, {f"{name}/{k}": t for k, t in {**reduce(name, a, g), "count": count}.items()}, self.dtype)

        with still(model.module):
            for some in batches(model, texts, self.rows):
                with torch.enable_grad(), watching(maps, some, partial(_follow, some, see)):
                    _loss(model, some, self.labels, self.seed).backward()
        return total


def _add(total: Sums, more: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Add tensors to sums of the same names, which keep the dtype that they began with."""
    for name, t in more.items():
        if name in total:
            total[name] += t
        else:
            total[name] = t.to(dtype or t.dtype, copy=True)


def _check(sums: Mapping[str, Tensor], maps: Sequence[LinearMap]) -> None:
    for m in maps:
        if f"{m.name}/count" not in sums:
            raise InputError(f"no loss depends on map {m.name}, or it was never run; leave it out")
    for name, t in sums.items():
        if not torch.isfinite(t).all():
            raise InputError(f"{name} is not finite; use another dtype for the model, or leave the map out")


def _follow(some: Rows, see: Callable[[str, Tensor, Tensor], None], at: LinearMap, a: Tensor, output: Tensor) -> Tensor:
    """Have `see(name, inputs, gradients)` called in the backward pass; the graph begins at the first map's output."""
    y = output if output.requires_grad else output.detach().requires_grad_(True)
    y.register_hook(lambda grad: see(at.name, a, rows_of(at.name, grad, some.chosen)))
    return y


def _loss(model: Model, some: Rows, labels: Labels, seed: int) -> Float[Tensor, ""]:
    """Summed negative log-probability of the labels: of what follows every position that predicts the answer.

    Raises:
        InputError: it is not finite.
    """
    predicts = some.batch.answer_mask[:, 1:]
    logits = model.module(**some.batch.inputs(), use_cache=False).logits[:, :-1][predicts]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    gold = some.batch.input_ids[:, 1:][predicts]
    owner = predicts.nonzero()[:, 0]
    targets = gold if labels == "gold" else torch.cat(list(_sampled(logits.detach(), owner, some.texts, seed)))
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    if not torch.isfinite(loss):
        raise InputError(f"the loss of texts {some.texts} is not finite; use another dtype for the model")
    return loss


def _sampled(
    logits: Float[Tensor, "row vocab"], owner: Int[Tensor, " row"], texts: Sequence[int], seed: int
) -> Iterator[Int[Tensor, " row"]]:
    """Yield labels drawn from the model's own distributions, by inversion, text by text.

    Yields:
        The labels of a text's rows.
    """
    for row, text in enumerate(texts):
        upto = logits[owner == row].softmax(-1).cumsum(-1)
        draw = torch.from_numpy(seeded("labels", seed, text).random((len(upto), 1))).to(upto)
        yield torch.searchsorted(upto, draw * upto[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
