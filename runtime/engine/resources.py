"""What an engine works with: facts, limits, a runner, storage, and how tokens become text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from sagellm.runtime.engine.limits import Limits
from sagellm.runtime.engine.runner import Runner
from sagellm.runtime.engine.speculation.speculation import Speculation
from sagellm.runtime.engine.transcript import Transcript
from sagellm.runtime.kv.storage import Storage
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.port import EngineFacts

OpenTranscript: TypeAlias = Callable[[SequenceState], Transcript]


@dataclass(frozen=True, slots=True)
class EngineResources:
    """What an engine works with. `open_transcript` is None where tokens have no text, `speculation`
    where no tokens are drafted.
    """

    facts: EngineFacts
    limits: Limits
    runner: Runner
    storage: Storage
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    open_transcript: OpenTranscript | None = None
    speculation: Speculation | None = None

    @property
    def schedules_ahead(self) -> bool:
        """Whether a step may be scheduled while the one before it computes: drafts need to know
        what that samples.
        """
        return self.runner.runs_ahead and self.speculation is None
