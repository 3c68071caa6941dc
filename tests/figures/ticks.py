"""The tick labels of a figure that are really drawn."""


def shown(figure):
    """Labels of ticks inside the view, once the figure was drawn; matplotlib keeps some beyond it."""
    found = []
    for axis in (axis for axes in figure.axes if axes.axison for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        found += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_visible()]
    return found
