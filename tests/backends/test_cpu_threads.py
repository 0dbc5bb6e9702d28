"""Which functions pick tokens, and on how many threads."""

import pytest

from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.program import pickers
from sagellm.backends.sampler import PICKERS
from sagellm.backends.token_masks import largest_allowed

KERNELS = native_kernels()


@pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
def test_tokens_are_picked_in_c_on_the_threads_of_the_queue():
    found = pickers(KERNELS, 3)
    assert found.largest == KERNELS.largest_allowed
    assert found.random.func == KERNELS.sample_random
    assert found.random.keywords == {"threads": 3}


def test_without_a_library_tokens_are_picked_in_numpy():
    assert pickers(None, 3) == PICKERS
    assert PICKERS.largest is largest_allowed
