"""lethescope: did the model forget, or did it only stop saying it?"""

from lethescope.audit import Audit, audit
from lethescope.errors import InputError
from lethescope.facts import Fact, read_facts
from lethescope.models import Model, load

__all__ = ["Audit", "Fact", "InputError", "Model", "audit", "load", "read_facts"]
