"""The verdict told to people: a self-contained HTML page, a card for Jupyter, and text for the terminal.

Every text here says what was found by which channel at which budget, what it was held against, and what was not
tried. None says that knowledge is gone for certain: no audit can show that.
"""

import base64
import functools
import math
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from lethescope.analyses.verdict import MARGIN
from lethescope.facts import Fact
from lethescope.figures import style
from lethescope.figures.residue import brief, note_of, number, planted_of
from lethescope.wording import CHANNEL_NOTES, FIGURE_NOTES, VERDICTS, Shown, Telling

_COLUMNS = 100  # of the terminal form


def render(
    verdict: Mapping[str, Any],
    evidence: pd.DataFrame | None = None,
    figures: Mapping[str, Figure] | None = None,
    facts: Sequence[Fact] = (),
) -> str:
    """Return the report as one HTML page that opens offline and needs no script.

    The page repeats the verdict and adds nothing to it; whether the verdict is right is a matter of the channels, the
    nulls and the planted controls that it lists. All texts of facts, paths and notes are escaped; a content security
    policy in the page forbids any request.

    Args:
        verdict: the dictionary of ``verdict.json``.
        evidence: rows with ``fact, subject, split, channel, role, value, null, residue``.
        figures: name to figure; ``residue`` is drawn at the top, the others where the model's layers are shown.
            A figure's label is its alternative text.
        facts: the facts, for their prompts and answers.
    """
    figures = dict(figures or {})
    forest = figures.pop("residue", None)
    sections = [_section(name, told, figures.pop(name, None)) for name, told in verdict.get("sections", {}).items()]
    return _template("report.html.j2").render(
        verdict=verdict,
        told=_told(verdict),
        grounds=grounds(verdict),
        margin=verdict.get("margin", MARGIN),
        channels=[_channel_row(channel, verdict) for channel in verdict.get("channels", ())],
        damage=damage_in_words(verdict),
        models=[{"role": role, "path": "", "approximate": False, **model} for role, model in _models(verdict)],
        forest=forest and _image(forest),
        figures=[(name, FIGURE_NOTES.get(name, Shown(name, "")), _image(figure)) for name, figure in figures.items()],
        sections=sections,
        splits=list(_fact_tables(verdict, evidence, facts)),
        command=command(verdict),
    )


def as_html_card(verdict: Mapping[str, Any]) -> str:
    """Return the verdict as a small piece of HTML, for Jupyter: the sentence, the grounds and the channels."""
    rows = [_channel_row(channel, verdict) for channel in verdict.get("channels", ())]
    return _template("card.html.j2").render(told=_told(verdict), grounds=grounds(verdict), channels=rows)


def as_text(verdict: Mapping[str, Any]) -> str:
    """Return the verdict for a terminal: plain ASCII of our own, at most 100 columns.

    >>> print(as_text({"verdict": "inconclusive", "reason": "3 forget facts are too few."}).splitlines()[0])
    INCONCLUSIVE: This evidence does not decide whether the model forgot.
    """
    told = _told(verdict)
    lines = [*_wrap(f"{told.name.upper()}: {told.sentence}"), *_wrap(told.caution), ""]
    for name, text in grounds(verdict):
        lines += _wrap(f"{name + ':':<14}{text}", indent=14)
    lines += ["", *_channel_lines(verdict.get("channels", ()), verdict)]
    return "\n".join(lines).replace("\u2212", "-") + "\n"


def grounds(verdict: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a verdict rests on, as pairs of a heading and a text: why, against what, and what was not tried."""
    blind = [f"{c['name']} ({note_of(c)})" for c in verdict.get("channels", ()) if note_of(c)]
    pairs = [
        ("Why", verdict.get("reason", "")),
        ("Residue", _residue(verdict)),
        ("Decided by", verdict.get("decided_by") or "no single channel"),
        ("Held against", held_against(verdict)),
        ("Blind", f"{', '.join(blind)}: finding nothing there means nothing" if blind else "no channel"),
        ("Damage", damage_in_words(verdict)),
        ("Not tried", "; ".join(verdict.get("not_tried", ())) or "nothing is listed"),
        ("Run", f"budget {verdict.get('budget', '?')}, seed {verdict.get('seed', '?')}, "
                f"lethescope {verdict.get('version', '?')}"),
    ]  # fmt: skip
    return [(name, text) for name, text in pairs if text]


def held_against(verdict: Mapping[str, Any]) -> str:
    """Return the nulls in words: references, control facts, and always the alternatives of each fact."""
    references = sum(role.startswith("reference") for role, _ in _models(verdict))
    control = verdict.get("facts", {}).get("control", 0)
    parts = []
    if references:
        parts.append(f"{_count(references, 'reference model')} that never learned the forget facts")
    if control:
        parts.append(f"{_count(control, 'control fact')} that no model was taught")
    return ", ".join([*parts, "the wrong alternatives of each fact"])


def damage_in_words(verdict: Mapping[str, Any]) -> str:
    """Return what became of the retain facts, nothing where that was not measured."""
    damage = verdict.get("damage") or {}
    before, after = number(damage.get("retain_before")), number(damage.get("retain_after"))
    if not (math.isfinite(before) and math.isfinite(after)):
        return ""
    left = brief({"estimate": damage.get("ratio"), "low": damage.get("low"), "high": damage.get("high")}, "unknown")
    word = "damaged" if damage.get("damaged") else "not damaged"
    return f"{word}: retain facts at {before:.2f} before and {after:.2f} after, a share of {left}"


def command(verdict: Mapping[str, Any]) -> str:
    """Return the command line that repeats the audit; capitals stand for what the verdict does not know."""
    parts = ["lethescope audit"]
    for role, model in _models(verdict):
        path = model.get("path")
        option = role.split("-")[0]
        if option in ("original", "unlearned", "reference"):
            parts.append(
                f"--{option} {option.upper() if path in (None, '', 'live module') else shlex.quote(str(path))}"
            )
    parts.append(f"--facts {shlex.quote(str(verdict.get('facts', {}).get('path') or 'FACTS.jsonl'))}")
    names = ",".join(channel["name"] for channel in verdict.get("channels", ()))
    parts += [f"--channels {shlex.quote(names)}"] if names else []
    parts += [f"--sections {shlex.quote(','.join(verdict['sections']))}"] if verdict.get("sections") else []
    parts += [f"--{name} {shlex.quote(str(verdict[name]))}" for name in ("budget", "seed") if name in verdict]
    return " \\\n  ".join([*parts, "--out DIR"])


@functools.cache
def _template(name: str) -> jinja2.Template:
    """Return a template of this package: everything escaped, a missing name is an error."""
    strict: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **strict)
    return environment.from_string(resources.files("lethescope").joinpath(name).read_text("utf-8"))


def _models(verdict: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return role and entry of every model."""
    return list((verdict.get("models") or {}).items())


def _told(verdict: Mapping[str, Any]) -> Telling:
    """Return the verdict in words; a word of a later version is shown as it is."""
    word = str(verdict["verdict"])
    return VERDICTS.get(word) or Telling(word.replace("_", " "), "", "", VERDICTS["inconclusive"].colour)


def _residue(verdict: Mapping[str, Any]) -> str:
    """Return the verdict's residue in words, and whose it is where another channel decided."""
    found, of = brief(verdict.get("residue")), verdict.get("residue_of")
    whose = f" in {of}" if of and of != verdict.get("decided_by") else ""
    return f"{found}{whose} (0 = as if never taught, 1 = as in the original)" if found else ""


def _count(number_of: int, thing: str) -> str:
    """Return "1 thing" or "3 things"."""
    return f"{number_of} {thing}{'s' * (number_of != 1)}"


def _channel_row(channel: Mapping[str, Any], verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table says of one channel, as text."""
    planted = [(kind.replace("_", " "), _planted(*entry)) for kind, entry in planted_of(channel).items()]
    return {
        "name": channel["name"],
        "decides": channel["name"] == verdict.get("decided_by"),
        "mark": note_of(channel),
        "residue": brief(channel.get("residue"), "not known"),
        "details": list(_details(channel)),
        "null": [(name, _digits(level, 2)) for name, level in (channel.get("null") or {}).items()],
        "planted": planted,
        "p": _p(channel.get("p_value")),
        "n_facts": channel.get("n_facts", "–"),
        "seconds": _digits(channel.get("seconds"), 1),
        "notes": CHANNEL_NOTES.get(channel["name"]),
    }


def _planted(estimate: float, low: float, high: float) -> str:
    """Return what was seen of a planted control; what counts is that its interval begins above the margin."""
    whole = brief({"estimate": estimate, "low": low, "high": high}, "–")
    return f"{whole} (≥ {_digits(low, 2)})" if math.isfinite(low) and not math.isfinite(high) else whole


def _details(channel: Mapping[str, Any]) -> Iterator[str]:
    """Yield what else is known of a channel's residue, one line each."""
    joint = brief(channel.get("simultaneous"))
    if " " in joint:
        yield f"{joint.split(' ', 1)[1]} for all channels at once"
    if channel.get("places"):
        yield "at " + style.shorten(", ".join(channel["places"]), 60)
    score = _digits(channel.get("unlearning_depth_score"), 2)
    if score != "–":
        yield f"Unlearning Depth Score {score}, null: {channel.get('unlearning_depth_null', '?')}"
    if channel.get("note"):
        yield str(channel["note"])


def _p(value: Any) -> str:
    """Return a p-value with three digits."""
    p = number(value)
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _digits(value: Any, digits: int) -> str:
    """Return a number with so many digits, a dash where there is none."""
    found = number(value)
    return f"{found:z.{digits}f}".replace("-", "−") if math.isfinite(found) else "–"


def _wrap(text: str, indent: int = 0) -> list[str]:
    """Return the text in lines of a terminal's width, all but the first set in."""
    return textwrap.wrap(text, _COLUMNS, subsequent_indent=" " * indent)


def _channel_lines(channels: Iterable[Mapping[str, Any]], verdict: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of channels, columns aligned."""
    form = "{:<16} {:<23} {:<17} {:<12} {:>8} {:>6} {:>8}"
    yield form.format("channel", "residue", "null", "planted", "p (Holm)", "facts", "seconds").rstrip()
    for channel in channels:
        row = _channel_row(channel, verdict)
        name, level = max(row["null"], key=lambda entry: number(channel["null"][entry[0]]), default=("", "–"))
        planted = ", ".join(found.split(" ")[0] for _, found in row["planted"])
        cells = (row["residue"], f"{level} {name}"[:17], planted[:12], row["p"], row["n_facts"], row["seconds"])
        mark = " *" * row["decides"]
        yield form.format(_short(row["name"], 16 - len(mark)) + mark, *(_ascii(cell) for cell in cells)).rstrip()
        if row["mark"]:
            yield f"  {row['mark']}"
    yield "* decides    p-values are Holm-corrected over the channels"


def _short(name: str, longest: int) -> str:
    """Return a name cut to a column."""
    return style.shorten(name, longest).replace("…", "~")


def _ascii(cell: Any) -> str:
    """Return a number's text with the signs that every terminal has."""
    return str(cell).replace("–", "-").replace("\u2212", "-")


def _image(figure: Figure) -> dict[str, str]:
    """Return a figure as the source and the alternative text of an image."""
    drawn = base64.b64encode(style.drawn_as(figure, "svg")).decode()
    return {"src": f"data:image/svg+xml;base64,{drawn}", "alt": str(figure.get_label())}


def _section(name: str, told: Mapping[str, Mapping[str, Any]], figure: Figure | None) -> dict[str, Any]:
    """Return one section of the report: its words, its figure, and a row of numbers for each model."""
    names = list(dict.fromkeys(number for numbers in told.values() for number in numbers))
    return {
        "shown": FIGURE_NOTES.get(name, Shown(name, "")),
        "image": figure and _image(figure),
        "names": [number.replace("_", " ") for number in names],
        "rows": [(role, [_digits(numbers.get(number), 2) for number in names]) for role, numbers in told.items()],
    }


def _fact_tables(
    verdict: Mapping[str, Any], evidence: pd.DataFrame | None, facts: Sequence[Fact]
) -> Iterator[dict[str, Any]]:
    """Yield one table a split: facts by channels, those with the largest residue first."""
    if evidence is None or evidence.empty:
        return
    by_id = {fact.id: fact for fact in facts}
    order = {channel["name"]: place for place, channel in enumerate(verdict.get("channels", ()))}
    for split in ("forget", "retain", "control"):
        here = evidence[evidence["split"] == split]
        if here.empty:
            continue
        values = here.pivot_table(index="fact", columns=["channel", "role"], values="value", sort=False, dropna=False)
        of_unlearned = here[here["role"] == "unlearned"]
        residues = of_unlearned.pivot_table(index="fact", columns="channel", values="residue", sort=False, dropna=False)
        names = sorted(here["channel"].unique(), key=lambda name: order.get(name, len(order)))
        subjects = here.drop_duplicates("fact").set_index("fact")["subject"]
        first = residues.mean(axis=1).reindex(subjects.index).sort_values(ascending=False, kind="stable").index
        rows = [_fact_row(by_id.get(fact), fact, subjects[fact], names, values, residues) for fact in first]
        yield {"split": split, "channels": names, "rows": rows}


def _fact_row(
    fact: Fact | None, name: str, subject: str, channels: Sequence[str], values: pd.DataFrame, residues: pd.DataFrame
) -> dict[str, Any]:
    """Return one fact's row: who, what, and per channel the original's value, the unlearned one's, and the residue."""
    cells = []
    for channel in channels:
        before, after = (_cell(values, name, (channel, role)) for role in ("original", "unlearned"))
        residue = _cell(residues, name, channel)
        shade = 0 if math.isnan(residue) else min(max(residue, 0), 1)
        cells.append({"before": _digits(before, 2), "after": _digits(after, 2), "shade": f"{shade:.2f}"})
    return {
        "id": name,
        "subject": subject,
        "prompt": fact and fact.prompt,
        "answer": fact and fact.answer,
        "cells": cells,
    }


def _cell(table: pd.DataFrame, row: str, column: Any) -> float:
    """Return a value of the table, NaN where it has none."""
    return float(table.loc[row, column]) if row in table.index and column in table.columns else math.nan
