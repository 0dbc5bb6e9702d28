"""`python -m sagellm` is the `sagellm` command."""

import sys

from sagellm.cli import main

sys.exit(main())
