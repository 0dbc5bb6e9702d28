"""A worker in another network namespace, that of the process whose id is in SAGELLM_TEST_FAR."""

import ctypes
import os

from sagellm.opening.worker_main import main

CLONE_NEWNET = 0x40000000

if __name__ == "__main__":
    pid = os.environ.pop("SAGELLM_TEST_FAR", "")
    if pid:
        descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(descriptor)
    main()
