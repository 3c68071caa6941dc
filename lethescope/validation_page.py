"""The page docs/validation.md: what a validation found, told from `validation.json` and nothing else.

Every share and every AUC stands with its interval, since a zoo has few models; what could not be measured is a dash.
"""

import functools
import math
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jinja2

from lethescope.figures.residue import brief, number
from lethescope.figures.validation import POOLS, compared, signed, verdict_counts
from lethescope.wording import VERDICTS

DASH = "–"
"""Stands where nothing could be measured."""

MEANT = {
    "P": "models that were taught the forget facts, and say them",
    "suppressor": "hold the facts by construction and do not say them",
    "deleter": "do not hold the facts by construction and do not say them",
    "N": "models that never saw the forget facts",
    "method": "made by a published unlearning method: what they hold is not known",
}
"""What is known of the models of each pool."""

ASKED = {
    "a": "Does a metric tell models that were taught the facts from models that never were?",
    "b": "Does a metric tell models that hold the facts and do not say them from models that do not hold them?",
}

ERRORS = {
    "false all-clear": "a model that holds the facts and does not say them is called *no residue found*",
    "false alarm": "a model that does not hold the facts is called *known*, *suppressed* or *partly erased*",
}

SEEN = {
    "patch needs a reference to testify": ("llama-1", "llama-2"),
    "places where the references show more than 0.2 do not count": (
        "llama-3",
        "llama-4",
        "llama-5",
        "llama-6",
        "gpt2-7",
    ),
    "without a reference a residue must be above 0.2 to be found": ("llama-5", "llama-6", "gpt2-7"),
}
"""Rules that were made after looking at some worlds: figures on those are not held out from the rule."""

CAPTIONS = {
    "separation": "Suppressors against deleters: AUC of each metric.",
    "verdicts": "Verdicts by pool; the right one is outlined.",
    "residues": "Residue of each channel in each model.",
}
"""Alternative texts of the figures; another figure goes by its name."""


class Table(NamedTuple):
    """The cells of a Markdown table, as text; a column of numbers is set to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def render(summary: Mapping[str, Any], *, command: str, figures: Mapping[str, str]) -> str:
    """Return the page as Markdown. It repeats the summary and proves no more than the models behind it do.

    Args:
        summary: what `validation.json` holds: `lethescope.analyses.validation.summarise`, and what was validated
            (``version``, ``zoo``, ``worlds``, ``budget``), each left out where it is missing.
        command: what makes the page again.
        figures: name (separation, verdicts, residues) to the figure's path as seen from the page.
    """
    kinds = [kind for kind in (True, False) if any(r["reference"] == kind for r in summary.get("verdicts", ()))]
    return _template().render(
        summary=summary,
        models=[(summary["models"][pool], POOLS[pool], MEANT[pool]) for pool in POOLS if summary["models"].get(pool)],
        total=sum(n for pool, n in summary["models"].items() if pool in POOLS),
        stressed=summary["models"].get("stressed", 0),
        kinds=[(audited(kind), verdict_table(summary, kind), error_table(summary, kind)) for kind in kinds],
        worlds=world_table(summary),
        rules=[
            (rule, ", ".join(worlds), bool(set(worlds) & set(summary.get("worlds", ()))))
            for rule, worlds in SEEN.items()
        ],
        errors=ERRORS,
        separation=[(key, ASKED[key], list(_separations(summary, key))) for key in ASKED],
        calibration=calibration_table(summary),
        robustness=robustness_table(summary),
        cost=cost_table(summary),
        figures={name: (CAPTIONS.get(name, name), _link(path)) for name, path in figures.items()},
        command=command,
        fence=_fence(command),
    )


def audited(reference: bool) -> str:
    """Return the kind of audit in words."""
    return "With a reference" if reference else "Without a reference"


def verdict_table(summary: Mapping[str, Any], reference: bool) -> Table:
    """Return how often each pool got each verdict, and the share right with its interval."""
    pools, counts = verdict_counts(summary, reference)
    right = {r["pool"]: r for r in summary.get("right", ()) if r["reference"] == reference}
    rows = [
        [POOLS[pool], *map(str, row), _of(right.get(pool)), brief(right.get(pool), DASH)]
        for pool, row in zip(pools, counts.tolist(), strict=True)
    ]
    if "all" in right:
        known = [row for pool, row in zip(pools, counts, strict=True) if pool in right]
        rows.append(["all of known truth", *map(str, sum(known)), _of(right["all"]), brief(right["all"], DASH)])
    return Table(["pool", *(told.name for told in VERDICTS.values()), "right", "share right"], rows)


def world_table(summary: Mapping[str, Any]) -> Table:
    """Return the share of right verdicts world by world, with a reference and without."""
    entries = summary.get("by_world", ())
    by = {(entry["world"], entry["reference"]): entry for entry in entries}
    worlds = list(dict.fromkeys(entry["world"] for entry in entries))
    rows = [
        [escaped(w), *(text(by.get((w, kind))) for kind in (True, False) for text in (_of, _brief))] for w in worlds
    ]
    return Table(["world", "with a reference", "share right", "without", "share right"], rows)


def error_table(summary: Mapping[str, Any], reference: bool) -> Table:
    """Return the two errors that matter with counts and intervals."""
    mine = [r for r in summary.get("errors", ()) if r["reference"] == reference]
    return Table(["error", "models", "share"], [[r["error"], _of(r), brief(r, DASH)] for r in mine])


def separation_table(summary: Mapping[str, Any], question: str, reference: bool) -> Table:
    """Return how well each metric separates, the best first."""
    head = ["metric", "AUC", "models", "difference to 1 - UDS"]
    rows = [
        [escaped(r["metric"]), brief(r, DASH), f"{r['n_holding']} / {r['n_empty']}", signed(r.get("over_uds"), DASH)]
        for r in compared(summary, question, reference)
    ]
    return Table(head, rows)


def calibration_table(summary: Mapping[str, Any]) -> Table:
    """Return the mean distance of each metric from the truth, over the pools and pool by pool."""
    entries = summary.get("calibration", ())
    pools = [pool for pool in POOLS if any(pool in entry for entry in entries)]
    rows = [
        [
            escaped(entry["metric"]),
            "yes" if entry["reference"] else "no",
            *(_digits(entry.get(key)) for key in ("error", *pools)),
        ]
        for entry in entries
    ]
    return Table(["metric", "reference", "mean over pools", *(POOLS[pool] for pool in pools)], rows)


def robustness_table(summary: Mapping[str, Any]) -> Table:
    """Return Q and R of each metric in both families."""
    measures = ("Q", "R", "Q one-sided", "R one-sided")
    rows = [
        [escaped(r["metric"]), str(r["models"]), *(_digits(r.get(key)) for key in measures)]
        for r in summary.get("robustness", ())
    ]
    return Table(["metric", "models", *measures], rows)


def cost_table(summary: Mapping[str, Any]) -> Table:
    """Return what each channel costs on one model."""
    rows = [
        [
            escaped(r["channel"]),
            _digits(r.get("seconds")),
            *(_digits(r.get(key), 0) for key in ("forward_passes", "backward_passes")),
        ]
        for r in summary.get("cost", ())
    ]
    return Table(["channel", "seconds", "forward passes", "backward passes"], rows)


def escaped(text: Any) -> str:
    r"""Return a text that Markdown shows as it is, on one line, in a table as well.

    >>> print(escaped("a_b|c"))
    a\_b\|c
    """
    return re.sub(r"([\\`*_{}\[\]<>|$#~&])", r"\\\1", " ".join(str(text).split()))


def _separations(summary: Mapping[str, Any], question: str) -> Iterator[tuple[str, Table]]:
    for reference in (True, False):
        table = separation_table(summary, question, reference)
        if table.rows:
            yield audited(reference), table


def _of(entry: Mapping[str, Any] | None) -> str:
    return f"{entry['count']} of {entry['of']}" if entry else DASH


def _brief(entry: Mapping[str, Any] | None) -> str:
    return brief(entry, DASH)


def _digits(value: Any, digits: int = 2) -> str:
    found = number(value)
    return f"{found:z,.{digits}f}".replace("-", "−") if math.isfinite(found) else DASH


def _link(path: str) -> str:
    return urllib.parse.quote(path, safe="/:%.")


def _fence(text: str) -> str:
    """Return a fence of backticks that the text does not hold."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def _markdown(table: Table) -> str:
    """Return the table's lines; the first column to the left, all others to the right."""
    rule = ["---", *("---:" for _ in table.head[1:])]
    return "\n".join(_line(cells) for cells in (table.head, rule, *table.rows))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


@functools.cache
def _template() -> jinja2.Template:
    """Return the page's template: a missing name is an error; Markdown is escaped cell by cell, not as HTML."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"escaped": escaped, "table": _markdown}
    return environment.from_string(resources.files("lethescope").joinpath("validation.md.j2").read_text("utf-8"))
