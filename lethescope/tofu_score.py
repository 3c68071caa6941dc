"""TOFU's two headline numbers, forget quality and model utility, from evaluation logs that others have written.

Reads TOFU's aggregated log (`eval_log_aggregated.json`) and OpenUnlearning's `TOFU_EVAL.json` (Maini et al. 2024, arXiv
2401.06121; Dorna et al. 2025, arXiv 2506.12618). Nothing is measured again. A good score says that the outputs look
like those of a model that never learned the forget set; it does not say that the knowledge is gone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy.stats import hmean, ks_2samp

from lethescope.errors import InputError
from lethescope.facts import parse_json, read_text

Average = Literal["arithmetic", "geometric"]
Log = Mapping[str, Any]

SECTIONS = {"retain": "retain", "real_authors": "ra", "world_facts": "wf", "forget": "forget"}
"""The four sets that TOFU asks about, and what OpenUnlearning's metrics of each begin with."""

TOFU_SECTIONS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
UTILITY = ("retain", "real_authors", "world_facts")


@dataclass(frozen=True)
class Section:
    """One set of questions, item by item: mean token losses in nats, and ROUGE-L recall; NaN where the log has null."""

    true: Float[np.ndarray, " item"]
    paraphrased: Float[np.ndarray, " item"]
    wrong: Float[np.ndarray, "item alternative"]
    rouge: Float[np.ndarray, " item"]


def tofu_score(
    log: str | Path, reference: str | Path | None = None, *, average: Average = "arithmetic"
) -> dict[str, Any]:
    """Return forget quality and model utility of a logged model.

    What it does not prove: both numbers are about outputs. A model that only stopped saying the answers can have a
    perfect forget quality.

    Args:
        log: TOFU's aggregated log or OpenUnlearning's `TOFU_EVAL.json` of the unlearned model.
        reference: the same of a model that never learned the forget set; forget quality is None without one.
        average: how the wrong answers' probabilities are averaged in the utility's truth ratios (`utility_parts`).

    Returns:
        `forget_quality` (p-value, 0 to 1, higher is more like the reference), `model_utility` (0 to 1, higher is
        better), its nine `parts` by set and quantity, and the `average` they were taken with.

    Raises:
        InputError: a file is missing or no such log, or a section, a key or an item in it is; it is named.

    Example:
        >>> tofu_score("nowhere.json")
        Traceback (most recent call last):
        lethescope.errors.InputError: nowhere.json: no such file
    """
    sections = read_sections(log)
    quality = None
    if reference is not None:
        quality = forget_quality(sections["forget"], read_sections(reference, only=("forget",))["forget"])
    parts = utility_parts(sections, average)
    return {"forget_quality": quality, "model_utility": model_utility(parts), "parts": parts, "average": average}


def forget_quality(unlearned: Section, reference: Section) -> float:
    """Return the p-value of a two-sample Kolmogorov-Smirnov test between the two models' truth ratios on forget.

    As in TOFU's code an item gives `exp(mean_k wrong_k loss - paraphrased loss)`, the inverse of its truth ratio with
    the wrong answers' probabilities averaged geometrically, whatever `utility_parts` does. The two logs may hold
    different items. A high value is no proof of equality: a small set gives one easily.
    """
    ratios = [1 / truth_ratios(section, "geometric") for section in (unlearned, reference)]
    return float(ks_2samp(*(ratio[~np.isnan(ratio)] for ratio in ratios)).pvalue)


def utility_parts(sections: Mapping[str, Section], average: Average = "arithmetic") -> dict[str, dict[str, float]]:
    """Return probability, ROUGE-L recall and truth ratio of retain, real authors and world facts, each in [0, 1].

    Probability is the mean of p(answer) on retain, and of p(answer) / (p(answer) + sum_k p(wrong_k)) on the other two.
    The truth ratio's part is the mean of max(0, 1 - p(wrong) / p(paraphrased)). TOFU has two versions of it:
    `arithmetic`, the paper's and that of its training runs (`utils.py`), takes the mean of the wrong answers'
    probabilities; `geometric`, that of its script for finished logs (`aggregate_eval_stat.py`) and of OpenUnlearning,
    takes the exponential of their mean log-probability. It is never the larger, so its utility is never the lower one.

    Args:
        sections: by name, as `read_sections` gives them.
        average: which of the two.

    Returns:
        Set -> quantity -> value; higher is better.
    """
    return {
        name: {
            "probability": _probability(sections[name], with_options=name != "retain"),
            "rouge": float(np.nanmean(sections[name].rouge)),
            "truth_ratio": float(np.nanmean(np.maximum(0, 1 - truth_ratios(sections[name], average)))),
        }
        for name in UTILITY
    }


def model_utility(parts: Mapping[str, Mapping[str, float]]) -> float:
    """Return the harmonic mean of all parts: 0 as soon as one of them is 0."""
    return float(hmean([value for part in parts.values() for value in part.values()]))


def truth_ratios(section: Section, average: Average) -> Float[np.ndarray, " item"]:
    """Return p(wrong) / p(paraphrased true answer) of every item, length-normalised, the wrong answers averaged."""
    if average == "geometric":
        return np.exp(section.paraphrased - section.wrong.mean(-1))
    return np.exp(-section.wrong).mean(-1) / np.exp(-section.paraphrased)


def read_sections(path: str | Path, only: tuple[str, ...] = tuple(SECTIONS)) -> dict[str, Section]:
    """Read the named sets from a log of TOFU or of OpenUnlearning.

    Args:
        path: the log.
        only: names in `SECTIONS`.

    Returns:
        Name -> section.

    Raises:
        InputError: the file is missing or no such log, or a section, a key or an item in it is; it is named.
    """
    path = Path(path)
    log = parse_json(read_text(path), path)
    if not isinstance(log, dict) or not log:
        raise InputError(f"{path}: no evaluation log; give TOFU's aggregated log or OpenUnlearning's TOFU_EVAL.json")
    ours = any(key in log for key in TOFU_SECTIONS.values())
    return {name: (_tofu_section if ours else _open_unlearning_section)(path, log, name) for name in only}


def _tofu_section(path: Path, log: Log, name: str) -> Section:
    section = _member(path, log, TOFU_SECTIONS[name])
    keys = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")
    return _section(
        path, [(f"{TOFU_SECTIONS[name]}/{key}", _member(path, section, key, TOFU_SECTIONS[name])) for key in keys]
    )


def _open_unlearning_section(path: Path, log: Log, name: str) -> Section:
    """On real authors and world facts OpenUnlearning, like TOFU, holds the answer itself against the wrong ones."""
    right = "PARA_Prob" if name in {"retain", "forget"} else "Prob"
    wanted = (("Prob", "avg_loss"), (right, "avg_loss"), ("PERT_Prob", "avg_loss"), ("ROUGE", "rougeL_recall"))
    metrics = [(f"{SECTIONS[name]}_Q_A_{metric}", quantity) for metric, quantity in wanted]
    return _section(path, [(f"{m}/{q}", _by_item(path, _member(path, log, m), m, q)) for m, q in metrics])


def _by_item(path: Path, metric: Any, name: str, quantity: str) -> dict[str, Any]:
    items = _member(path, metric, "value_by_index", name)
    if not isinstance(items, Mapping):
        raise InputError(f"{path}: {name}/value_by_index is no object of items; give OpenUnlearning's TOFU_EVAL.json")
    return {i: None if e is None else _member(path, e, quantity, f"{name}, item {i}") for i, e in items.items()}


def _member(path: Path, holder: Any, key: str, where: str = "") -> Any:
    if not isinstance(holder, Mapping) or key not in holder:
        kind = f"key {key!r} of {where}" if where else f"section {key!r}"
        there = ", ".join(list(holder)[:8]) if isinstance(holder, Mapping) else "no object"
        raise InputError(f"{path}: {kind} is missing; there is {there or 'nothing'}")
    return holder[key]


def _section(path: Path, columns: Sequence[tuple[str, Any]]) -> Section:
    """Line the four quantities up by item, in the order of the first one.

    Raises:
        InputError: a quantity is no object of items or has other items than the first, or a value is no number.
    """
    first, items = columns[0][0], list(columns[0][1]) if isinstance(columns[0][1], Mapping) else []
    for name, column in columns:
        if not isinstance(column, Mapping) or not column:
            raise InputError(f"{path}: {name} holds no items; expected {{item: number}}")
        if column.keys() != set(items):
            odd = sorted(column.keys() ^ set(items))[0]
            raise InputError(f"{path}: {name} and {first} have different items; only one has item {odd}")
    true, paraphrased, wrong, rouge = (
        [_numbers(path, f"{name}, item {i}", column[i]) for i in items] for name, column in columns
    )
    widths = {len(row) for row in wrong if not np.isnan(row).any()} or {1}
    if len(widths) > 1 or {len(row) for row in (*true, *paraphrased, *rouge)} != {1}:
        raise InputError(f"{path}: {columns[2][0]} must hold equally many numbers for every item, the others one")
    wide = [row if not np.isnan(row).any() else np.full(max(widths), np.nan) for row in wrong]
    one, other, recall = (np.array(column)[:, 0] for column in (true, paraphrased, rouge))
    return Section(one, other, np.array(wide), recall)


def _numbers(path: Path, where: str, value: Any) -> Float[np.ndarray, " number"]:
    """Return one number or a list of them as an array; null is NaN.

    Raises:
        InputError: it is something else, or NaN or infinite.
    """
    values = value if isinstance(value, list) else [value]
    for number in values:
        fine = number is None or (isinstance(number, int | float) and not isinstance(number, bool))
        if not fine or (number is not None and not math.isfinite(number)):
            raise InputError(f"{path}: {where} is {number!r}; expected a finite number")
    if not values:
        raise InputError(f"{path}: {where} is an empty list; expected numbers")
    return np.array([math.nan if number is None else number for number in values], dtype=float)


def _probability(section: Section, *, with_options: bool) -> float:
    p = np.exp(-section.true)
    share = p / (p + np.exp(-section.wrong).sum(-1)) if with_options else p
    return float(np.nanmean(share))
