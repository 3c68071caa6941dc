"""Channel *readout*: can a linear probe that learned the relation on other facts read this one from the model?"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from sklearn import config_context
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from lethescope import measurement
from lethescope.channel import Channel, every_budget
from lethescope.facts import Fact
from lethescope.hooks import capturing
from lethescope.models import Model
from lethescope.scoring import tails
from lethescope.tokens import encode


def measure(
    model: Model,
    facts: Sequence[Fact],
    *,
    original: Model | None = None,
    seed: int = 0,
    per_class: int = 2,
    least: int = 12,
) -> xr.Dataset:
    """Train linear probes on retain facts and read forget and control facts with them, layer by layer.

    For each relation and layer a linear discriminant analysis (shrinkage by Ledoit-Wolf, features standardised) learns
    `state at the last prompt token -> answer` on the retain facts of the same model. Its log-posterior scores the
    candidates of a fact that it never saw. Its cross-validated accuracy on retain facts stands beside the accuracy of
    the same probe on shuffled labels; the difference is the *selectivity* (Hewitt & Liang 2019, arXiv 1909.03368).
    That a probe reads a fact shows that the state carries it, not that the model uses it.

    Args:
        model: any language model.
        facts: retain facts train the probes, forget and control facts are read.
        original: not used.
        seed: of the folds and of the shuffled labels.
        per_class: an answer needs so many retain facts to be a class.
        least: a relation needs so many retain facts in classes, and two classes, to be testable at all.

    Returns:
        `score(fact, candidate, place)`, log-posterior in nats, NaN for facts that are not testable (their relation or
        their answer has too few retain facts); places are blocks. `accuracy`, `shuffled_accuracy` and `selectivity`
        over (probed_relation, place), in [0, 1] and [-1, 1].
    """
    retain = [f for f in facts if f.split == "retain"]
    read = [f for f in facts if f.split != "retain"]
    x_train, x_read = states(model, retain), states(model, read)
    layers = len(model.blocks)
    width = 1 + max(len(f.alternatives) for f in read)
    score = np.full((len(read), width, layers), np.nan)
    relations = sorted({f.relation for f in read if f.relation})
    accuracy = np.full((2, len(relations), layers), np.nan)
    for r, relation in enumerate(relations):
        train = _trainable([i for i, f in enumerate(retain) if f.relation == relation], retain, per_class, least)
        rows = [i for i, f in enumerate(read) if f.relation == relation]
        labels = np.array([retain[i].answer for i in train])
        for layer in range(layers) if train else ():
            # threads and checks take longer than these small matrices
            with threadpool_limits(1), config_context(skip_parameter_validation=True):
                probe = _probe().fit(x_train[train, layer], labels)
                posterior = np.log(probe.predict_proba(x_read[rows, layer]).clip(1e-12))
                accuracy[:, r, layer] = _accuracies(x_train[train, layer], labels, seed)
            column = {answer: k for k, answer in enumerate(probe.classes_)}
            for row, log_p in zip(rows, posterior, strict=True):
                score[row, :, layer] = _by_candidate(read[row], column, log_p, width)
    dims = ("probed_relation", "place")
    return measurement.from_scores(
        score,
        read,
        [f"block {layer}" for layer in range(layers)],
        place_coords={"layer": range(layers)},
        variables={
            "accuracy": (dims, accuracy[0]),
            "shuffled_accuracy": (dims, accuracy[1]),
            "selectivity": (dims, accuracy[0] - accuracy[1]),
        },
    ).assign_coords(probed_relation=relations)


@torch.no_grad()
def states(model: Model, facts: Sequence[Fact]) -> Float[np.ndarray, "fact layer d_model"]:
    """Residual stream after every block at the last prompt token of each fact."""
    encoded = [encode(model.tokenizer, f.prompt, f.answer) for f in facts]
    found: dict[int, np.ndarray] = {}
    for batch in tails(model, encoded):
        with capturing(model.blocks, stop=True) as seen:
            batch.run(model)
        last = torch.stack([seen[layer][batch.owner, 0] for layer in range(len(model.blocks))], 1)
        found.update(zip(batch.rows, last.float().cpu().numpy(), strict=True))
    return np.stack([found[i] for i in range(len(facts))]) if facts else np.zeros((0, len(model.blocks), 0))


def _probe() -> LinearDiscriminantAnalysis:
    return make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))


def _trainable(rows: list[int], retain: Sequence[Fact], per_class: int, least: int) -> list[int]:
    """Return the rows whose answers occur often enough, or none when the relation is too small to test."""
    answers = [retain[i].answer for i in rows]
    kept = [i for i in rows if answers.count(retain[i].answer) >= per_class]
    return kept if len(kept) >= least and len({retain[i].answer for i in kept}) >= 2 else []


def _by_candidate(fact: Fact, column: dict[str, int], log_p: np.ndarray, width: int) -> np.ndarray:
    out = np.full(width, np.nan)
    if fact.answer in column:
        for k, answer in enumerate((fact.answer, *fact.alternatives)):
            out[k] = log_p[column[answer]] if answer in column else np.nan
    return out


def _accuracies(x: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, float]:
    """Cross-validated accuracy on the labels and on the labels shuffled; NaN where half the facts are one a class."""
    folds = StratifiedKFold(2, shuffle=True, random_state=seed)

    def accuracy(y: np.ndarray) -> float:
        halves = list(folds.split(x, y))
        if any(len(a) <= len(set(y[a])) for a, _ in halves):
            return float("nan")
        return float(np.mean([_probe().fit(x[a], y[a]).score(x[b], y[b]) for a, b in halves]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an answer with one fact in a fold has no covariance of its own
        return accuracy(labels), accuracy(np.random.default_rng(seed).permutation(labels))


CHANNEL = Channel(
    name="readout",
    measure=measure,
    version=1,
    scale="preference",
    citation="Alain & Bengio 2016 (arXiv 1610.01644); Hewitt & Liang 2019 (arXiv 1909.03368)",
    budgets=every_budget(),
    splits=("forget", "retain", "control"),
)
