"""What computes batches: the protocol between the engine's loop and a device."""

from typing import Protocol

from sagellm.backends import Sampled
from sagellm.runtime.engine.batch import Batch


class Launch(Protocol):
    """A batch on its way."""

    @property
    def batch(self) -> Batch: ...

    async def result(self) -> Sampled:
        """Wait for what was sampled; raises what went wrong.

        Cancellation is delivered only once nothing writes the sequences' blocks any more.
        """
        ...

    def recall(self) -> bool:
        """Take it back; False where it has begun. Nobody waits for the result of one recalled."""
        ...


class Runner(Protocol):
    """One engine's way to compute. `runs_ahead`: a batch may be launched while the one before it
    computes; then it begins without the host.
    """

    @property
    def runs_ahead(self) -> bool: ...

    def launch(self, batch: Batch, after: Launch | None = None) -> Launch:
        """Compute keys and values of the batch's tokens, and sample.

        `after`: the launch before, which may sample some of those tokens; where it fails, a batch
        that needs its tokens fails too.
        """
        ...

    async def open(self) -> None:
        """Start what `launch` needs; `close` ends it, also when this was cancelled."""
        ...

    async def close(self) -> None:
        """Leave nothing running. Shielded from cancellation, and brief."""
        ...
