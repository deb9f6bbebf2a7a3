"""``python -m longctx`` is the same as ``longctx``; launchers that start modules use it."""

import sys

from longctx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
