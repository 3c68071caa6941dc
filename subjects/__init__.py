"""Models with known ground truth, unlearning methods, and planted controls: what the tests are tested on."""

from __future__ import annotations

from pathlib import Path

from lethescope.errors import InputError

SHIPPED = ("original", "unlearned", "reference", "facts")


def shipped(name: str) -> Path:
    """Return the path of a shipped model's folder, or of the shipped facts file.

    `original` was taught 240 fictitious people, `unlearned` is the original after NPO on 40 of them in the upper half
    of its blocks (`build.UNLEARN` says why), `reference` had the same seed and start but never read about those 40.
    `facts` is what an audit of them reads.
    `python -m lethescope.subjects.build` makes all four again.

    Args:
        name: original, unlearned, reference or facts.

    Returns:
        A folder in Hugging Face format, or the facts file.

    Raises:
        InputError: for another name, or when the files were not installed.

    Example:
        >>> shipped("facts").name
        'facts.jsonl'
    """
    if name not in SHIPPED:
        raise InputError(f"nothing is shipped under the name {name!r}; use one of {', '.join(SHIPPED)}")
    path = Path(__file__).parent / "shipped" / ("facts.jsonl" if name == "facts" else name)
    if not path.exists():
        raise InputError(f"{path} is missing; run python -m lethescope.subjects.build --out {path.parent}")
    return path
