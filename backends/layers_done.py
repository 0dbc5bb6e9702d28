"""How far a step has come, as other threads may see while it computes."""

import ctypes
import os


class LayersDone:
    """How many layers of one step have written all their keys and values.

    Whoever computes says so and rings `bell`, an eventfd; C does both by `address`.
    """

    def __init__(self, bell: int) -> None:
        self.bell = bell
        self._count = ctypes.c_long(0)

    @property
    def count(self) -> int:
        return self._count.value

    @property
    def address(self) -> int:
        return ctypes.addressof(self._count)

    def tell(self, count: int) -> None:
        self._count.value = count
        os.eventfd_write(self.bell, 1)
