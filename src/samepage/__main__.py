"""`python -m samepage` is the same as `samepage`."""

import sys

from samepage.commands import main

if __name__ == "__main__":
    sys.exit(main())
