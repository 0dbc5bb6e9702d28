"""Runs `sagellm serve ARGS` in a folder, with its output in a log file that stays small.

`python -m sagellm.background.serve_main LOG FOLDER ARGS`
"""

import os
import sys
from pathlib import Path

from sagellm.__main__ import command
from sagellm.background.log_file import keep_small


def serve() -> int:
    """Serve until the end of the gateway, and return its exit code."""
    _, log, folder, *args = sys.argv
    keep_small(Path(log))
    os.chdir(folder)
    sys.argv = ["sagellm", "serve", *args]
    return command()


if __name__ == "__main__":
    sys.exit(serve())
