"""A turn of the core: the time of one event, and the effects that it has had so far."""

from dataclasses import dataclass, field

from sagellm.runtime.core.effects import Effect


@dataclass(slots=True)
class Turn:
    """`now` is in seconds of the shell's clock; the core has no other."""

    now: float = 0.0
    effects: list[Effect] = field(default_factory=list)

    def time(self) -> float:
        return self.now
