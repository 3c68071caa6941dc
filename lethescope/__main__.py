"""`python -m lethescope` is the command line."""

import sys

from lethescope.cli import main

sys.exit(main())
