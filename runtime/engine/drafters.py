"""Drafters: n-gram lookup in a sequence's own tokens, and a smaller model."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import takewhile

import msgspec
import trio

from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.options import EngineOptionError, EngineOptions
from sagellm.runtime.engine.runner import Runner, StepLaunch
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.engine.sizing import lease_shape
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.messages import Sampling
from sagellm.runtime.models.folder import ModelFolder, resolve_model

_LONGEST = 4  # tokens of a match that are as good as any more
_NUM_PLACES = 16  # earlier places of the last two tokens that are compared


class NgramIndex:
    """Where each pair of tokens occurred, newest first; it reads every token once."""

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int], int] = {}  # a pair -> the position behind it
        self._before: list[int] = []  # position -> the one before it behind the same pair; 0: none

    def draft(self, tokens: Items[int], count: int) -> list[int]:
        """What followed the newest of the longest matches (4 to 2 tokens) with the end of `tokens`.

        A match that overlaps the end goes on in its own period. Empty where nothing matches.
        """
        self._read(tokens)
        place = self._place(tokens)
        if not place:
            return []
        drafts: list[int] = []
        for at in range(place, place + count):
            drafts.append(tokens[at] if at < len(tokens) else drafts[at - len(tokens)])
        return drafts

    def _read(self, tokens: Items[int]) -> None:
        """The pair at the end has nothing behind it yet, and is read with the next token."""
        for at in range(len(self._before), len(tokens)):
            if at < 2:
                self._before.append(0)
                continue
            pair = tokens[at - 2], tokens[at - 1]
            self._before.append(self._latest.get(pair, 0))
            self._latest[pair] = at

    def _place(self, tokens: Items[int]) -> int:
        place = self._latest.get((tokens[-2], tokens[-1]), 0) if len(tokens) > 2 else 0
        best, most = place, 2
        for _ in range(_NUM_PLACES):
            if not place or most == _LONGEST:
                break
            size = _match(tokens, place)
            if size > most:
                best, most = place, size
            place = self._before[place]
        return best


def _match(tokens: Items[int], place: int) -> int:
    """How many tokens before `place` equal the last ones; two are known to."""
    size = 2
    while size < _LONGEST and size < place and tokens[place - 1 - size] == tokens[-1 - size]:
        size += 1
    return size


class NgramDrafter:
    """An index a sequence. Takes microseconds, so nothing is awaited."""

    token_s = 0.0

    def __init__(self) -> None:
        self._indices: dict[Sequence, NgramIndex] = {}

    async def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        return {sequence: self._drafts(sequence, count) for sequence, count in wanted.items()}

    def forget(self, sequence: Sequence) -> None:
        self._indices.pop(sequence, None)

    def clear(self) -> None:
        self._indices.clear()

    def _drafts(self, sequence: Sequence, count: int) -> list[int]:
        index = self._indices.setdefault(sequence, NgramIndex())
        return index.draft(sequence.tokens, count)


_WEIGHT = 0.2  # of the newest measurement
_GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Token ids that both models know, the draft model's context, the rows of a pass at most."""

    vocab_size: int
    max_model_len: int
    max_num_batched_tokens: int


class ModelDrafter:
    """A draft sequence beside each sequence, with a lease of its own.

    Its tokens are those of the sequence and the drafts after them; what was drafted wrongly is
    computed anew the next time, and a prompt in the parts that one pass may hold, so that a
    sequence gets its first drafts some steps late. A sequence that is preempted keeps its draft
    blocks until others want them. `runner` launches the draft model on the engine's own queue.
    """

    def __init__(self, runner: Runner, pool: BlockPool, limits: DraftLimits) -> None:
        self.pool = pool
        self.token_s = 0.0
        self._runner = runner
        self._limits = limits
        self._twins: dict[Sequence, Sequence] = {}  # the one used last at the end
        self._num_known: dict[Sequence, int] = {}  # of a twin's tokens that were no drafts

    async def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        twins = {
            sequence: twin
            for sequence, count in wanted.items()
            if (twin := self._ready(sequence, count, wanted)) is not None
        }
        is_late = any(twin.num_pending > 2 for twin in twins.values())
        ends = {twin: len(twin.tokens) + wanted[sequence] for sequence, twin in twins.items()}
        started_s = trio.current_time()
        if twins:
            await self._compute(ends)
        known = {sequence: twin for sequence, twin in twins.items() if twin in self._num_known}
        drafts = {sequence: self._drafts(twin) for sequence, twin in known.items()}
        if twins and not is_late:  # reading a prompt is paid once
            self._learn(trio.current_time() - started_s, sum(map(len, drafts.values())))
        return drafts

    def forget(self, sequence: Sequence) -> None:
        twin = self._twins.pop(sequence, None)
        if twin is not None:
            del self._num_known[twin]
            if twin.lease is not None:
                self.pool.advance(twin.lease, "finish")

    def clear(self) -> None:
        for sequence in tuple(self._twins):
            self.forget(sequence)

    def _learn(self, seconds: float, num_tokens: int) -> None:
        token_s = seconds / max(1, num_tokens)
        self.token_s += _WEIGHT * (token_s - self.token_s) if self.token_s else token_s

    # ---- keeping in step -------------------------------------------------------------------------

    def _ready(
        self, sequence: Sequence, count: int, wanted: Mapping[Sequence, int]
    ) -> Sequence | None:
        """The twin with the sequence's tokens and blocks for drafts; None where it has none."""
        num_tokens = len(sequence.tokens) + count
        if num_tokens > self._limits.max_model_len:
            return None
        twin = self._twins.pop(sequence, None) or self._twin(sequence)
        self._twins[sequence] = twin
        if not self._catch_up(twin, sequence.tokens):
            return None
        return twin if self._reserve(twin, num_tokens, wanted) else None

    def _twin(self, sequence: Sequence) -> Sequence:
        twin = Sequence(
            msgspec.structs.replace(sequence.state, sampling=_GREEDY),
            arrival=sequence.arrival,
            mailbox=sequence.mailbox,
            max_output=sequence.max_output,
            stop_ids=sequence.stop_ids,
            output_text=None,
        )
        twin.tokens = []
        self._num_known[twin] = 0
        return twin

    def _catch_up(self, twin: Sequence, tokens: list[int]) -> bool:
        """Keep the drafts that were right, and take the tokens behind them; whether it can."""
        num_known = num_right = self._num_known[twin]
        if max(tokens[num_known:], default=0) >= self._limits.vocab_size:
            return False
        for guess, token_id in zip(twin.tokens[num_known:], tokens[num_known:], strict=False):
            if guess != token_id:
                break
            num_right += 1
        twin.tokens[num_right:] = tokens[num_right:]
        twin.num_computed = min(twin.num_computed, num_right, len(tokens) - 1)
        self._num_known[twin] = len(tokens)
        return True

    def _reserve(self, twin: Sequence, num_tokens: int, wanted: Iterable[Sequence]) -> bool:
        """Blocks for so many tokens, at the cost of twins that wait longest for a step."""
        lease, pool = twin.lease, self.pool
        num_blocks = (
            pool.num_blocks_missing(lease, num_tokens)
            if lease
            else pool.num_blocks_needed(num_tokens)
        )
        for sequence in tuple(self._twins):
            if self.pool.num_free >= num_blocks:
                break
            if sequence not in wanted:
                self.forget(sequence)
        if self.pool.num_free < num_blocks:
            return False
        if twin.lease is None:
            twin.lease = self.pool.reserve(twin.fence, num_tokens)
        elif num_tokens > twin.lease.capacity:
            self.pool.grow(twin.lease, num_tokens)
        return True

    # ---- computing -------------------------------------------------------------------------------

    async def _compute(self, ends: Mapping[Sequence, int]) -> None:
        """Launch pass after pass, without waiting for what they sample, until every twin that has
        caught up has as many tokens as `ends` says.
        """
        launches: list[StepLaunch] = []
        try:
            batch = self._batch(ends)
            while batch.sequences:
                launches.append(self._runner.launch(batch, launches[-1] if launches else None))
                batch.begin()
                batch = self._batch(twin for twin in batch.sampling if twin.num_known < ends[twin])
        finally:
            for launch in launches:
                await self._collect(launch)

    async def _collect(self, launch: StepLaunch) -> None:
        batch = launch.batch
        try:
            sampled = await launch.result()
        finally:
            batch.end()
        for twin, query_len in zip(batch.sequences, batch.query_lens, strict=True):
            twin.num_computed += query_len
        for twin, token_id in zip(batch.sampling, sampled.token_ids, strict=True):
            twin.tokens.append(token_id)

    def _batch(self, twins: Iterable[Sequence]) -> Batch:
        """As much of what is pending as one pass may hold, the shortest first."""
        batch, room = Batch(), self._limits.max_num_batched_tokens
        for twin in sorted(twins, key=lambda twin: twin.num_pending):
            query_len = min(twin.num_pending, room)
            if query_len:
                batch.add(twin, query_len)
                room -= query_len
        return batch

    def _drafts(self, twin: Sequence) -> list[int]:
        """Those that the other model knows as well."""
        drafts = twin.tokens[self._num_known[twin] :]
        return list(takewhile(lambda token_id: token_id < self._limits.vocab_size, drafts))


def draft_folder(options: EngineOptions, folder: ModelFolder) -> ModelFolder | None:
    """None where no model drafts; reads no weight. Raises EngineOptionError, ModelError,
    UnsupportedModel.

    The numbers of logits may differ, as padding differs between sizes of a family: what counts is
    that both read token ids alike.
    """
    if options.speculation is not None and lease_shape(options, folder.facts).num_state_blocks:
        raise EngineOptionError(
            f"speculation: {folder.name} has layers with a recurrent state, which cannot go back "
            "to before a wrong draft; drop it"
        )
    if options.draft_model is None:
        return None
    draft = resolve_model(options.draft_model)
    if draft.path is None:
        raise EngineOptionError("draft_model: null computes nothing; name a model, or use ngram")
    if draft.tokenizer_hash != folder.tokenizer_hash:
        raise EngineOptionError(
            f"draft_model: {draft.name} and {folder.name} have different vocabularies; give a "
            "smaller model with the same tokenizer, or use speculation: ngram"
        )
    if lease_shape(options, draft.facts).num_state_blocks:
        raise EngineOptionError(
            f"draft_model: {draft.name} has layers with a recurrent state, which cannot go back to "
            "before a wrong draft; name another, or use speculation: ngram"
        )
    return draft
