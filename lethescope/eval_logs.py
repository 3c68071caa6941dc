"""Logs of other evaluations (OpenUnlearning, TOFU) as tidy tables, to hold our numbers against theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lethescope.errors import InputError
from lethescope.facts import parse_json, read_text

LogRow = tuple[str, Any, int, str, float]


def read_open_unlearning_log(path: str | Path) -> pd.DataFrame:
    """A log of OpenUnlearning (`TOFU_EVAL.json`, `*_SUMMARY.json`) or of TOFU's own evaluation as a tidy table.

    Columns: `metric` (the log's section, or the file's name where the log has none), `item` (the row's number; missing
    for an aggregate), `candidate` (0, 1, … in a list, as for the perturbed answers; else 0), `quantity`
    (`prob`, `avg_loss`, `score`, `agg_value`, …) and `value` (float). Texts are left out, and so is what the log holds
    as null. The numbers are as the other program computed them; nothing is measured again, and it is not checked that
    they come from the models under audit.

    Raises:
        InputError: the file is missing, not JSON, or not such a log.
    """
    path = Path(path)
    log = parse_json(read_text(path), path)
    records = list(_log_rows("", log)) if isinstance(log, dict) else []
    if not records:
        raise InputError(f"{path}: no evaluation log; expected {{metric: {{agg_value, value_by_index}}}} with numbers")
    table = pd.DataFrame(records, columns=["metric", "item", "candidate", "quantity", "value"])
    table["metric"] = table["metric"].replace("", path.stem)
    return table.astype({"item": "Int64", "candidate": "int64", "value": "float64"})


def _log_rows(metric: str, section: Mapping[str, Any]) -> Iterator[LogRow]:
    # a section holds aggregates, values by item (nested one way by OpenUnlearning, the other by TOFU), or sections
    for name, part in section.items():
        if name == "value_by_index" and _is_by_item(part):
            for item, entry in part.items():
                for quantity, value in entry.items() if isinstance(entry, Mapping) else [("value", entry)]:
                    yield from _log_values(metric, int(item), quantity, value)
        elif _is_by_item(part):
            for item, value in part.items():
                yield from _log_values(metric, int(item), name, value)
        elif isinstance(part, Mapping):
            yield from _log_rows(f"{metric}/{name}" if metric else name, part)
        else:
            yield from _log_values(metric, pd.NA, name, part)


def _is_by_item(part: Any) -> bool:
    return isinstance(part, Mapping) and bool(part) and all(key.isdecimal() for key in part)


def _log_values(metric: str, item: Any, quantity: str, value: Any) -> Iterator[LogRow]:
    for candidate, number in enumerate(value if isinstance(value, list) else [value]):
        if isinstance(number, int | float) and not isinstance(number, bool):
            yield metric, item, candidate, quantity, float(number)
