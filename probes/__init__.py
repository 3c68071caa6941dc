"""Instruments that look at one model: a model and facts in, a labelled array out. One a file."""

from lethescope.probes import landscape, lens, readout, say

CHANNELS = {module.CHANNEL.name: module.CHANNEL for module in (say, readout, lens, landscape)}
