"""Instruments that look at one model: a model and facts in, a labelled array out. One a file."""

from lethescope.probes import lens, readout, say

CHANNELS = {channel.name: channel for channel in (say.CHANNEL, readout.CHANNEL, lens.CHANNEL)}
