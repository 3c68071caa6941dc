"""Comparisons and interventions: what the models show before, after, and where there is nothing to find."""

from lethescope.analyses import compress, emphasis, jogging, patch, relearn

CHANNELS = {module.CHANNEL.name: module.CHANNEL for module in (patch, relearn, compress, emphasis, jogging)}
