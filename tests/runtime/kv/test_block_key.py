"""Keys of blocks: equal for equal tokens after equal tokens in one salt, and for nothing else."""

import subprocess
import sys

from sagellm.runtime.kv.prefix_tree import block_key

FIRST = block_key(None, [1, 2, 3, 4], "s")


def test_equal_sequences_have_equal_keys():
    assert block_key(None, (1, 2, 3, 4), "s") == FIRST
    assert len(FIRST.digest) == 16


def test_tokens_parent_and_salt_count():
    others = [
        block_key(None, [1, 2, 3, 5], "s"),
        block_key(None, [1, 2, 3, 4], "t"),
        block_key(None, [1, 2, 3, 4], ""),
        block_key(FIRST, [1, 2, 3, 4], "s"),
        block_key(block_key(None, [1, 2, 3, 4], "t"), [1, 2, 3, 4], "t"),
    ]
    assert len({FIRST.digest, *(key.digest for key in others)}) == 6


def test_the_salt_is_compared_too():
    assert FIRST.content != block_key(None, [1, 2, 3, 4], "t").content


def test_every_process_hashes_with_a_key_of_its_own():
    program = (
        "from sagellm.runtime.kv.prefix_tree import block_key\n"
        "print(block_key(None, [1, 2, 3, 4], 's').digest.hex())"
    )
    seen = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert len({FIRST.digest.hex(), *(one.stdout.strip() for one in seen)}) == 3
