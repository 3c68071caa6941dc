"""Figures: a labelled array or a verdict in, a matplotlib figure out. They return and never show.

One file a figure, each with a function ``paper(...)``; `style` holds what they share (widths, colours, saving).
A figure's label (``figure.get_label()``) is its description in words, which the report uses as alternative text.
"""

from lethescope.figures.audit import of_audit

__all__ = ["of_audit"]
