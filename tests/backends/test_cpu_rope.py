"""The shared tables of angles are long enough for each caller, whatever other threads do."""

from sagellm.backends.cpu.native_forms import RopeTables
from sagellm.graphs.kernels.token_mixers import Rope


class Raced(RopeTables):
    """Tables whose store is undone by another thread at once."""

    @property
    def _tables(self):
        return self._first

    @_tables.setter
    def _tables(self, made):
        self._first = made[:256]


def test_another_thread_cannot_shorten_tables_that_were_asked_for():
    assert len(Raced(Rope(8, 10000.0)).up_to(1000)) == 1024


def test_tables_grow_and_stay():
    tables = RopeTables(Rope(8, 10000.0))
    grown = tables.up_to(300)
    assert grown.shape == (512, 2, 4)
    assert tables.up_to(5) is grown
