"""Entry of `python -m runner`; `main` is also the console script `runner`."""

from __future__ import annotations

import sys

from runner.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
