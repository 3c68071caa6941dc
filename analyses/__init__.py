"""Comparisons and interventions: what the models show before, after, and where there is nothing to find."""

from lethescope.analyses import compress, patch, relearn

CHANNELS = {channel.name: channel for channel in (patch.CHANNEL, relearn.CHANNEL, compress.CHANNEL)}
