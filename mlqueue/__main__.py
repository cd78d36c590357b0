"""``python -m mlqueue``: the command line, see `mlqueue.cli`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
