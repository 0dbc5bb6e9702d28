"""Recovery: whether a request whose engine was lost enters again at once, on trial, or never.

A request that got a token since its last loss enters again at once. Any other request may have
crashed the engine. Such requests are tried one at a time, each until its first token, so that only
one request can be to blame for the next crash. A request that may have crashed two engines is
quarantined: it ends, and equal requests are refused for `QUARANTINE_S`.

The loss of a link counts half as much as a crash, because a request rarely causes it.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from sagellm.runtime.containers import Buckets
from sagellm.runtime.messages import ChoiceKey, Item, Request, TokenEvent
from sagellm.runtime.port import LossCause

RecoveryVerdict: TypeAlias = Literal["now", "later", "never", "spent"]

QUARANTINE_S = 600.0
_BLAME: dict[LossCause, float] = {"death": 1.0, "link": 0.5, "none": 0.0}
_MAX_BLAME = 2.0  # blame that quarantines a request; a new token resets the blame
_GAPS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_MAX_RETURNS = 100  # losses of one request for any cause: stops an endless loop


class Recovery:
    """Decides which requests enter again, and keeps those that wait for their trial.

    `clock`: the executor's clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.num_migrated = 0
        self.gaps_s = Buckets(_GAPS_S)  # seconds from a loss to the next token or the end
        self._clock = clock
        self._lost_s: dict[ChoiceKey, float] = {}
        self._num_returns: dict[ChoiceKey, int] = {}
        self._blame: dict[ChoiceKey, float] = {}
        self._num_known: dict[ChoiceKey, int] = {}  # emitted tokens at the last loss
        self._on_trial: ChoiceKey | None = None
        self._waiting: deque[tuple[str, Request]] = deque()
        self._blocked_until_s: dict[bytes, float] = {}

    def judge(self, node: str, request: Request, cause: LossCause) -> RecoveryVerdict:
        """Decide on a request that an engine of the operator `node` lost.

        `now`: let the request enter. `later`: the request is kept here until `next` returns it.
        `never`: the request may have crashed two engines; it must end. `spent`: the request was
        lost too often, though nothing suggests that it is the cause; it must end.
        """
        key = request.key
        self._lost_s.setdefault(key, self._clock())
        if self._on_trial == key:
            self._on_trial = None
        self._num_returns[key] = self._num_returns.get(key, 0) + 1
        num_emitted = request.num_emitted
        has_advanced = num_emitted > self._num_known.get(key, 0)
        self._num_known[key] = num_emitted
        if has_advanced:
            self._blame[key] = 0.0
        else:
            self._blame[key] = self._blame.get(key, 0.0) + _BLAME[cause]
        if self._num_returns[key] > _MAX_RETURNS:
            return "spent"
        if not self._blame[key]:
            return "now"
        if self._blame[key] >= _MAX_BLAME:
            self._blocked_until_s[_digest(request)] = self._clock() + QUARANTINE_S
            return "never"
        self._waiting.append((node, request))
        return "later"

    def next(self) -> tuple[str, Request] | None:
        """Put the next waiting request on trial, and return it with its operator.

        Returns None while another request is on trial, or if no request waits.
        """
        if self._on_trial is not None or not self._waiting:
            return None
        node, request = self._waiting.popleft()
        self._on_trial = request.key
        return node, request

    def lost_s(self, key: ChoiceKey) -> float | None:
        """The time at which a request was lost; None if it has had a token since."""
        return self._lost_s.get(key)

    @property
    def is_under_way(self) -> bool:
        """Whether any request has had no token since its loss."""
        return bool(self._lost_s)

    def note(self, item: Item) -> None:
        """Complete the recovery of a choice when tokens, or its end, reach the sink."""
        if item.key not in self._lost_s:
            return
        if isinstance(item, TokenEvent) and not item.num_tokens and not item.is_last:
            return
        self.gaps_s.observe(self._clock() - self._lost_s.pop(item.key))
        if self._on_trial == item.key:
            self._on_trial = None

    def drop(self, concerned: Callable[[ChoiceKey], bool]) -> tuple[Request, ...]:
        """Remove and return the requests that wait for their trial and match `concerned`."""
        dropped = tuple(request for _, request in self._waiting if concerned(request.key))
        if dropped:
            self._waiting = deque(one for one in self._waiting if not concerned(one[1].key))
        return dropped

    def forget(self, key: ChoiceKey) -> None:
        """Drop everything about a choice that has ended."""
        if key not in self._num_returns:
            return
        for known in (self._num_returns, self._blame, self._num_known):
            known.pop(key, None)
        self._lost_s.pop(key, None)
        self.drop(key.__eq__)
        if self._on_trial == key:
            self._on_trial = None

    def is_blocked(self, request: Request) -> bool:
        """Whether an equal request was quarantined recently."""
        if not self._blocked_until_s:
            return False
        now = self._clock()
        self._blocked_until_s = {
            digest: until_s for digest, until_s in self._blocked_until_s.items() if until_s > now
        }
        return _digest(request) in self._blocked_until_s


def _digest(request: Request) -> bytes:
    """A digest of the prompt and the sampling parameters.

    The seed and the client are left out: a crash rarely depends on them.
    """
    sampling = msgspec.structs.replace(request.sampling, seed=None)
    # The prompt of a simulation is a sequence of its own type, which msgspec does not know.
    prompt = tuple(request.prompt_token_ids) or (request.prompt, request.messages)
    content = msgspec.msgpack.encode((prompt, sampling))
    return hashlib.blake2b(content, digest_size=16).digest()
