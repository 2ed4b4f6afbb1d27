"""`python -m pawl_server.cli`: the same as `pawl`."""

import sys

from pawl_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
