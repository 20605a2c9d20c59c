"""`python -m llamax.cli`."""

import sys

from llamax.cli import main

sys.exit(main())
