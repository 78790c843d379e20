"""__main__: `python -m fastres` is the command `fastres`."""

import sys

from fastres.cli import main

sys.exit(main())
