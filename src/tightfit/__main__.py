"""`python -m tightfit`, the same as the command `tightfit`."""

import sys

from tightfit.cli.main import main

sys.exit(main())
