"""`python -m effattn` is the `effattn` command."""

import sys

from effattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
