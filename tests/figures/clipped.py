"""What of a figure lies outside of it, measured on the boxes that are really drawn."""

from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def outside(figure):
    """Texts whose box leaves the figure by more than a hundredth of an inch, and the figure's whole box if it does."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    slack = 0.01 * figure.dpi
    ticks = {id(label) for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}
    found = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text() and id(text) not in ticks:
            box = text.get_window_extent(renderer)
            if min(box.x0, box.y0) < -slack or box.x1 > figure.bbox.x1 + slack or box.y1 > figure.bbox.y1 + slack:
                found.append(text.get_text())
    whole, (width, height) = figure.get_tightbbox(renderer), figure.get_size_inches()
    if min(whole.x0, whole.y0) < -0.01 or whole.x1 > width + 0.01 or whole.y1 > height + 0.01:
        found.append(f"figure {whole}")
    return found


def overlapping(texts, figure):
    """Pairs of texts whose boxes overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts if t.get_text()]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, two in boxes[i + 1 :] if one.overlaps(two)]
