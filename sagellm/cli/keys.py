"""`sagellm keys`: what links over a network prove themselves with."""

from pathlib import Path

from sagellm.cli.failure import Failure
from sagellm.runtime.comm.keys import create_keys


def keys(folder: Path, /) -> int:
    """Make the CURVE keys of a graph and its workers, in a new folder that only you can enter.

    Parameters
    ----------
    folder
        Where; `executor.keys` then names it, and `executor.address` a tcp address.
    """
    try:
        create_keys(folder)
    except FileExistsError:
        raise Failure(
            f"{folder} is there already", "name another folder: keys that are in use are not lost"
        ) from None
    print(f"--set executor.keys={folder.absolute()} --set executor.address=tcp://127.0.0.1:0")
    return 0
