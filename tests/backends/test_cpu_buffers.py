"""Buffers of the native step: side by side, reused once dead, as wide as the widest user."""

from sagellm.backends.cpu.translation import Buffers, BufferSlice


def test_results_of_one_kernel_lie_side_by_side():
    buffers = Buffers()
    assert buffers.take([3, 5]) == (BufferSlice(0, 0, 3), BufferSlice(0, 3, 5))
    assert buffers.stride(0) == 8


def test_a_buffer_is_used_again_when_all_of_it_is_dead():
    buffers = Buffers()
    first, second = buffers.take([3, 5])
    buffers.drop(first)
    assert buffers.take([2]) == (BufferSlice(1, 0, 2),)
    buffers.drop(second)
    assert buffers.take([2]) == (BufferSlice(0, 0, 2),)
    assert buffers.firsts() == (0, 8, 10)


def test_the_narrowest_that_fits_is_taken_else_the_widest_grows():
    buffers = Buffers()
    places = [*buffers.take([4]), *buffers.take([9]), *buffers.take([6])]
    for place in places:
        buffers.drop(place)
    assert buffers.take([5]) == (BufferSlice(2, 0, 5),)
    assert buffers.take([20]) == (BufferSlice(1, 0, 20),)
    assert buffers.firsts() == (0, 4, 24, 30)
