"""`python -m rlrazor` is the command `razor`."""

import sys

from rlrazor.cli import main

sys.exit(main())
