"""Recovery of requests whose engine was lost: enter again at once, on trial, or never.

A request that got tokens since its last loss enters again at once. Any other request may be what
the engine died of: such requests are tried one at a time, each until its first token, so that a
second death has one cause. After two deaths a request is quarantined, and equal requests are
refused for `QUARANTINE_S`.

The loss of a link counts as half a death, because a request is rarely its cause.
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
_MAX_BLAME = 2.0  # since the last token
_GAPS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_MAX_RETURNS = 100  # of one request, for whatever cause: engines are replaced, but not so often


class Recovery:
    """`clock`: the executor's, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.num_migrated = 0
        self.gaps_s = Buckets(_GAPS_S)  # from a loss to the next token or the end
        self._clock = clock
        self._lost_s: dict[ChoiceKey, float] = {}
        self._num_returns: dict[ChoiceKey, int] = {}
        self._blame: dict[ChoiceKey, float] = {}
        self._num_known: dict[ChoiceKey, int] = {}  # emitted tokens at the last loss
        self._on_trial: ChoiceKey | None = None
        self._waiting: deque[tuple[str, Request]] = deque()
        self._blocked_until_s: dict[bytes, float] = {}

    def judge(self, node: str, request: Request, cause: LossCause) -> RecoveryVerdict:
        """Decide on a request that an engine of `node` lost.

        `now`: let it enter. `later`: kept here, and returned by `next`. `never`: engines died of
        it. `spent`: it returned too often, although no fault of its own is known.
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
        """The next request to try, which is now on trial; None while another is on trial."""
        if self._on_trial is not None or not self._waiting:
            return None
        node, request = self._waiting.popleft()
        self._on_trial = request.key
        return node, request

    def lost_s(self, key: ChoiceKey) -> float | None:
        """When a request was lost, if it has had no token since."""
        return self._lost_s.get(key)

    @property
    def is_under_way(self) -> bool:
        """Whether any request has had no token since its loss."""
        return bool(self._lost_s)

    def note(self, item: Item) -> None:
        """An item reached the sink: its first token, or its end, completes the recovery."""
        if item.key not in self._lost_s:
            return
        if isinstance(item, TokenEvent) and not item.num_tokens and not item.is_last:
            return
        self.gaps_s.observe(self._clock() - self._lost_s.pop(item.key))
        if self._on_trial == item.key:
            self._on_trial = None

    def drop(self, concerned: Callable[[ChoiceKey], bool]) -> tuple[Request, ...]:
        """Remove and return the requests that wait for their trial and are concerned."""
        dropped = tuple(request for _, request in self._waiting if concerned(request.key))
        if dropped:
            self._waiting = deque(one for one in self._waiting if not concerned(one[1].key))
        return dropped

    def forget(self, key: ChoiceKey) -> None:
        """The choice has ended."""
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
    """The digest of everything that a request makes an engine compute, for any client."""
    sampling = msgspec.structs.replace(request.sampling, seed=None)
    prompt = request.prompt_token_ids or (request.prompt, request.messages)
    content = msgspec.msgpack.encode((prompt, sampling))
    return hashlib.blake2b(content, digest_size=16).digest()
