"""What a step says of its layers is true at the moment that it says so."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sagellm.backends.cpu import CpuBackend
from sagellm.backends.cpu.native_program import NativeProgram
from sagellm.backends.layers_done import LayersDone

_FULL = 2**64 - 2  # rings of an eventfd that nobody has heard: the next one waits
UNTOUCHED = 7.0  # what the pool is full of


@contextmanager
def rings(room: int) -> Iterator[int]:
    """A bell that can be rung so often until somebody hears it."""
    bell = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(bell, _FULL - room)
    try:
        yield bell
    finally:
        os.close(bell)


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "by kernels"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_layers_that_are_done_are_written_and_later_ones_are_not(
    reference, paged, num_layers, is_native
):
    model = reference("qwen2", num_hidden_layers=3)
    sequences = paged(model, CpuBackend(), dtype="float32", deterministic=True)
    if is_native and not isinstance(sequences.program, NativeProgram):
        pytest.skip("no C compiler on this machine")
    if not is_native and isinstance(sequences.program, NativeProgram):
        sequences.program = sequences.program._on_tensors
    with rings(num_layers - 1) as bell:
        sequences.layers_done = LayersDone(bell)
        step = threading.Thread(target=sequences.step, args=({"a": list(range(40))},))
        step.start()
        while sequences.layers_done.count < num_layers:
            time.sleep(1e-3)
        seen = sequences.pool.clone()
        os.eventfd_read(bell)
        step.join()
    used = sequences.blocks["a"]
    done, later = seen[:num_layers, :, used], seen[num_layers:]
    assert torch.equal(done, sequences.pool[:num_layers, :, used])
    assert (done != UNTOUCHED).any()
    assert (later == UNTOUCHED).all()
    assert sequences.layers_done.count == len(sequences.pool) == 3


@pytest.fixture
def crowd():
    """More threads than cores: when the first of them is done, others have not begun."""
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


def test_a_layer_is_done_when_all_threads_have_written_it(reference, paged, crowd):
    """Nobody is held up here: what is there is looked at the moment that it is said to be."""
    model = reference("qwen2", num_hidden_layers=6)
    sequences = paged(model, CpuBackend(), dtype="float32", deterministic=True)
    if not isinstance(sequences.program, NativeProgram):
        pytest.skip("no C compiler on this machine")
    with rings(2**32) as bell:
        for number in range(15):
            done = sequences.layers_done = LayersDone(bell)
            name = str(number % 2)
            used, sequences.lengths[name] = sequences.blocks.get(name, []), 0
            sequences.pool[:, :, used] = UNTOUCHED
            step = threading.Thread(target=sequences.step, args=({name: list(range(90))},))
            step.start()
            seen = {}
            while step.is_alive():
                count = done.count
                if count not in seen and sequences.blocks.get(name):
                    seen[count] = sequences.pool[:count, :, sequences.blocks[name]]
            step.join()
            for count, found in seen.items():
                written = sequences.pool[:count, :, sequences.blocks[name]]
                assert torch.equal(found, written), (number, count)


def test_the_next_step_does_not_speak_to_who_listened_before(reference, paged):
    sequences = paged(reference("qwen2"), CpuBackend(), dtype="float32", deterministic=True)
    with rings(8) as bell:
        done = sequences.layers_done = LayersDone(bell)
        sequences.step({"a": [1, 2, 3]})
        assert done.count == len(sequences.pool)
        heard = os.eventfd_read(bell)
        sequences.layers_done = None
        sequences.step({"a": [1, 2, 3]})
        os.eventfd_write(bell, 1)
        assert heard == _FULL - 8 + len(sequences.pool)
        assert os.eventfd_read(bell) == 1
