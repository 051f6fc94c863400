"""`python -m ib_explain` is `ib-explain`."""

import sys

from ib_explain.cli import main

if __name__ == "__main__":
    sys.exit(main())
