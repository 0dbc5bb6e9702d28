"""Memory in large pages: weights that are read from end to end come sooner from it."""

import mmap

import torch

LARGE_PAGE = 2 << 20  # bytes


def empty_in_large_pages(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A vector, as far as it fills large pages; a common one where it fills none.

    The rest lies in small pages, so that no memory is taken for what is not there. The system may
    have no large pages left, or none at all: then the memory is as any other.
    """
    num_bytes = num_elements * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    if num_bytes < LARGE_PAGE or advice is None:
        return torch.empty(num_elements, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + LARGE_PAGE)
    start = -_address(memory) % LARGE_PAGE
    try:
        memory.madvise(advice, start, num_bytes // LARGE_PAGE * LARGE_PAGE)
    except OSError:  # a kernel without them
        return torch.empty(num_elements, dtype=dtype)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=start).view(dtype)


def in_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a contiguous tensor in such memory; itself where it fills no large page."""
    if tensor.nbytes < LARGE_PAGE:
        return tensor
    return empty_in_large_pages(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
