"""Curvature of the loss in a model's weights: which directions everything uses, and which only a few texts do.

Two curvatures with opposite signs go by one word in the literature. That of the loss of *one* text is high where it was
learned by heart; that of the loss of a *population* is low in the directions that such a text uses. Each name here says
which one it means.
"""
