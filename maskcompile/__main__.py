"""``python -m maskcompile``: the command line."""

import sys

from maskcompile.cli import main

sys.exit(main())
