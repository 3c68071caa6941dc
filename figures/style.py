"""What all figures share: widths, fonts, one colour a role and a channel, and saving that is stable to the byte."""

import difflib
import functools
import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import matplotlib
from matplotlib.figure import Figure

from lethescope.errors import InputError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

WIDTHS = {"neurips": 5.5, "icml": 3.25, "icml-wide": 6.75, "report": 7.5}
"""Inches: the text of NeurIPS, one column and both columns of ICML, and the HTML report."""

NARROW = 4.5
"""Inches; figures below have shorter names, fewer ticks and no intervals in words."""

INK, FAINT, DIM, PALE = "#1f2328", "#6b6f76", "#a4a8af", "#dcdee2"

# Petroff's sequences (arXiv:2107.02270): told apart with every common form of colour blindness
_CHANNELS = {
    "say": "#3f90da",
    "readout": "#ffa90e",
    "lens": "#832db6",
    "patch": "#bd1f01",
    "relearn": "#a96b59",
    "compress": "#92dadd",
    "landscape": "#717581",
    "emphasise": "#e76300",
    "context": "#b9ac70",
}
_SPARE = ("#94a4a2", "#a4a8af", "#5a5d63")


class Look(NamedTuple):
    """How the lines of one role are drawn: the line style and the marker tell roles apart without colour, too."""

    color: str
    linestyle: Any
    marker: str


_ROLES = {
    "original": Look("#5790fc", "-", "o"),
    "unlearned": Look("#e42536", "-", "s"),
    "reference": Look("#7c7d82", "--", "^"),
    "null": Look("#7c7d82", ":", "v"),
    "planted": Look("#964a8b", "-.", "D"),
    "planted-last_block": Look("#b98ab2", "-.", "X"),
}


def role_look(role: str) -> Look:
    """Return colour, line style and marker of a role; a role without its own look goes by its kind.

    >>> role_look("reference-3") == role_look("reference")
    True
    """
    return _ROLES.get(role) or _ROLES.get(role.split("-")[0], Look(INK, (0, (1, 1)), "x"))


def channel_colour(channel: str) -> str:
    """Return the colour of a channel; a channel without one of its own gets a spare, always the same."""
    return _CHANNELS.get(channel) or _SPARE[zlib.crc32(channel.encode()) % len(_SPARE)]


def width_of(width: str | float) -> float:
    """Return a figure's width in inches from the name of a preset (`WIDTHS`) or from a number.

    Raises:
        InputError: the preset is not known, or the number is not above 0.

    >>> width_of("icml")
    3.25
    """
    if isinstance(width, str):
        if width not in WIDTHS:
            near = difflib.get_close_matches(width, WIDTHS, n=1, cutoff=0.0)[0]
            raise InputError(f"figure width {width!r} is not known: use {near!r}, one of {sorted(WIDTHS)}, or inches")
        return WIDTHS[width]
    if not width > 0:
        raise InputError(f"figure width {width} is not a width: give inches above 0")
    return float(width)


def settings() -> dict[Any, Any]:
    """Return matplotlib's own defaults with ours on top, so that a user's matplotlibrc changes nothing."""
    # these choose how a session shows figures, not how a figure looks
    session = ("backend", "interactive", "timezone")
    defaults: dict[str, Any] = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(session)}
    return defaults | {
        "font.family": ["DejaVu Sans"],  # comes with matplotlib, so every machine has it
        "font.size": 7.5,
        "axes.titlesize": 8,
        "axes.labelsize": 7.5,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "text.color": INK,
        "text.parse_math": False,  # a subject's name may hold a dollar sign
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "lines.linewidth": 1.2,
        "lines.markersize": 3,
        "image.cmap": "cividis",
        "pdf.fonttype": 42,  # TrueType: conferences refuse Type 3
        "ps.fonttype": 42,
        "svg.fonttype": "path",
        "svg.hashsalt": "lethescope",
        "savefig.dpi": 200,
    }


def styled(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function draw under `settings`; the caller's own settings are back afterwards."""

    @functools.wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with matplotlib.rc_context(settings()):
            return draw(*args, **kwargs)

    return drawn


class Drawing(Figure):
    """A figure that shows itself in a notebook, whether pyplot was loaded or not."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return drawn_as(self, "png"), {"width": round(120 * self.get_figwidth())}


def blank(width: str | float, height: float) -> Figure:
    """Return an empty figure of this width (preset or inches) and height (inches) that keeps labels inside."""
    return Drawing(figsize=(width_of(width), height), layout="constrained")


def legend_columns(figure: Figure) -> int:
    """Return how many entries of a legend fit side by side."""
    return 3 if figure.get_figwidth() > NARROW else 2


def shorten(text: str, longest: int) -> str:
    """Return the text on one line, its middle left out if it is longer than that many characters.

    >>> shorten("a very long name indeed", 11)
    'a ver…ndeed'
    """
    line = " ".join(text.split())
    if len(line) <= longest:
        return line
    tail = (longest - 1) // 2
    return line[: longest - 1 - tail] + "…" + line[len(line) - tail :]


_WITHOUT_DATES: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None, "ModDate": None},
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
}


@styled
def drawn_as(figure: Figure, kind: str) -> bytes:
    """Return the figure as the bytes of a pdf, png or svg file: the same figure gives the same bytes.

    Raises:
        InputError: the kind is none of these.
    """
    if kind not in _WITHOUT_DATES:
        raise InputError(f"a figure cannot be saved as {kind!r}: use one of .pdf, .png, .svg")
    out = io.BytesIO()
    figure.savefig(out, format=kind, metadata=_WITHOUT_DATES[kind])
    return out.getvalue()


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write the figure to a .pdf, .png or .svg file in its own size, without dates, and return the path.

    Raises:
        InputError: the suffix is none of these.
    """
    path = Path(path)
    path.write_bytes(drawn_as(figure, path.suffix.lstrip(".").lower()))
    return path
