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
from sagellm.runtime.models.folder import ModelFolder, resolve_model
from sagellm.runtime.sampling import Sampling

_LONGEST = 4  # tokens of the longest match: longer matches draft no better
_NUM_PLACES = 16  # earlier places of the last two tokens that are compared
_WEIGHT = 0.2  # of the newest measurement in the mean
_GREEDY = Sampling()


class NgramIndex:
    """The positions of each pair of adjacent tokens in one sequence, newest first. Each token is
    read once.
    """

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int], int] = {}  # a pair -> the position after it
        self._before: list[int] = []  # position -> the previous position after the same pair, or 0

    def draft(self, tokens: Items[int], count: int) -> list[int]:
        """Find the last tokens (4, else 3, else 2) at an earlier place in `tokens`, and return the
        `count` tokens that follow there. The longest match wins, then the newest. Empty without a
        match.
        """
        self._read(tokens)
        place = self._place(tokens)
        if not place:
            return []
        drafts: list[int] = []
        for at in range(place, place + count):
            # Past the end of `tokens` the drafts themselves continue the match.
            drafts.append(tokens[at] if at < len(tokens) else drafts[at - len(tokens)])
        return drafts

    def _read(self, tokens: Items[int]) -> None:
        # The pair at the end has no token after it yet, and is read with the next token.
        for at in range(len(self._before), len(tokens)):
            if at < 2:
                self._before.append(0)
                continue
            pair = tokens[at - 2], tokens[at - 1]
            self._before.append(self._latest.get(pair, 0))
            self._latest[pair] = at

    def _place(self, tokens: Items[int]) -> int:
        """The position after the best match, or 0."""
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
    """The number of tokens before `place` that equal the last tokens, from 2 to 4. The caller has
    compared two.
    """
    size = 2
    while size < _LONGEST and size < place and tokens[place - 1 - size] == tokens[-1 - size]:
        size += 1
    return size


class NgramDrafter:
    """Drafts by prompt lookup, as vLLM and transformers do: answers repeat their prompts and
    themselves.

    Drafts take microseconds, so nothing is awaited.
    """

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


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """The limits of a draft model. `vocab_size`: both models know the token ids below it.
    `max_model_len`: the context limit of the draft model, in tokens. `max_num_batched_tokens`: the
    most tokens of one pass.
    """

    vocab_size: int
    max_model_len: int
    max_num_batched_tokens: int


class ModelDrafter:
    """Drafts greedily with a smaller model. For each sequence it keeps a copy, which has a lease in
    the draft model's `pool`.

    A copy has the tokens of its sequence, and after them the drafts. At the next call, wrong drafts
    are replaced by the sequence's tokens. A prompt is computed in chunks that fit one pass, so a
    sequence gets its first drafts some steps late. A preempted sequence keeps its draft blocks
    until other sequences need them. `runner` launches the draft model on the engine's own queue.
    """

    def __init__(self, runner: Runner, pool: BlockPool, limits: DraftLimits) -> None:
        self.pool = pool
        self.token_s = 0.0
        self._runner = runner
        self._limits = limits
        self._copies: dict[Sequence, Sequence] = {}  # the copy used last is the last entry
        self._num_known: dict[Sequence, int] = {}  # tokens of a copy that are no drafts

    async def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        copies = {
            sequence: copy
            for sequence, count in wanted.items()
            if (copy := self._ready(sequence, count, wanted)) is not None
        }
        is_late = any(copy.num_pending > 2 for copy in copies.values())
        ends = {copy: len(copy.tokens) + wanted[sequence] for sequence, copy in copies.items()}
        started_s = trio.current_time()
        if copies:
            await self._compute(ends)
        known = {sequence: copy for sequence, copy in copies.items() if copy in self._num_known}
        drafts = {sequence: self._drafts(copy) for sequence, copy in known.items()}
        if copies and not is_late:  # a prompt is computed only once, and would spoil the mean
            self._learn(trio.current_time() - started_s, sum(map(len, drafts.values())))
        return drafts

    def forget(self, sequence: Sequence) -> None:
        copy = self._copies.pop(sequence, None)
        if copy is not None:
            del self._num_known[copy]
            if copy.lease is not None:
                self.pool.advance(copy.lease, "finish")

    def clear(self) -> None:
        for sequence in tuple(self._copies):
            self.forget(sequence)

    def _learn(self, seconds: float, num_tokens: int) -> None:
        token_s = seconds / max(1, num_tokens)
        self.token_s += _WEIGHT * (token_s - self.token_s) if self.token_s else token_s

    # ---- copies --------------------------------------------------------------------------------

    def _ready(
        self, sequence: Sequence, count: int, wanted: Mapping[Sequence, int]
    ) -> Sequence | None:
        """Update the copy of a sequence to its tokens, with blocks for `count` drafts. Return None
        if the draft model cannot draft for the sequence, or blocks are lacking.
        """
        num_tokens = len(sequence.tokens) + count
        if num_tokens > self._limits.max_model_len:
            return None
        copy = self._copies.pop(sequence, None) or self._new_copy(sequence)
        self._copies[sequence] = copy
        if not self._catch_up(copy, sequence.tokens):
            return None
        return copy if self._reserve(copy, num_tokens, wanted) else None

    def _new_copy(self, sequence: Sequence) -> Sequence:
        copy = Sequence(
            msgspec.structs.replace(sequence.state, sampling=_GREEDY),
            arrival=sequence.arrival,
            mailbox=sequence.mailbox,
            max_output=sequence.max_output,
            stop_ids=sequence.stop_ids,
            output_text=None,
        )
        copy.tokens = []
        self._num_known[copy] = 0
        return copy

    def _catch_up(self, copy: Sequence, tokens: list[int]) -> bool:
        """Update a copy to `tokens`, and keep its drafts that were right. Return False if the draft
        model does not know some token.
        """
        num_known = num_right = self._num_known[copy]
        if max(tokens[num_known:], default=0) >= self._limits.vocab_size:
            return False
        for guess, token_id in zip(copy.tokens[num_known:], tokens[num_known:], strict=False):
            if guess != token_id:
                break
            num_right += 1
        copy.tokens[num_right:] = tokens[num_right:]
        copy.num_computed = min(copy.num_computed, num_right, len(tokens) - 1)
        self._num_known[copy] = len(tokens)
        return True

    def _reserve(self, copy: Sequence, num_tokens: int, wanted: Iterable[Sequence]) -> bool:
        """Lease blocks for `num_tokens` tokens. If blocks are lacking, forget the least recently
        used copies, except copies of `wanted`. Return False if blocks are still lacking.
        """
        lease, pool = copy.lease, self.pool
        num_blocks = (
            pool.num_blocks_missing(lease, num_tokens)
            if lease
            else pool.num_blocks_needed(num_tokens)
        )
        for sequence in tuple(self._copies):
            if self.pool.num_free >= num_blocks:
                break
            if sequence not in wanted:
                self.forget(sequence)
        if self.pool.num_free < num_blocks:
            return False
        if copy.lease is None:
            copy.lease = self.pool.reserve(copy.fence, num_tokens)
        elif num_tokens > copy.lease.capacity:
            self.pool.grow(copy.lease, num_tokens)
        return True

    # ---- computing -----------------------------------------------------------------------------

    async def _compute(self, ends: Mapping[Sequence, int]) -> None:
        """Compute one pass of the copies in `ends`, then more passes until each copy without
        pending prompt tokens has `ends[copy]` tokens. Each pass is launched before the previous
        pass has sampled.
        """
        launches: list[StepLaunch] = []
        try:
            batch = self._batch(ends)
            while batch.sequences:
                launches.append(self._runner.launch(batch, launches[-1] if launches else None))
                batch.begin()
                batch = self._batch(copy for copy in batch.sampling if copy.num_known < ends[copy])
        finally:
            for launch in launches:
                await self._collect(launch)

    async def _collect(self, launch: StepLaunch) -> None:
        batch = launch.batch
        try:
            sampled = await launch.result()
        finally:
            batch.end()
        for copy, query_len in zip(batch.sequences, batch.query_lens, strict=True):
            copy.num_computed += query_len
        for copy, token_id in zip(batch.sampling, sampled.token_ids, strict=True):
            copy.tokens.append(token_id)

    def _batch(self, copies: Iterable[Sequence]) -> Batch:
        """One pass with as many pending tokens as fit, from the copies with the fewest first."""
        batch, room = Batch(), self._limits.max_num_batched_tokens
        for copy in sorted(copies, key=lambda copy: copy.num_pending):
            query_len = min(copy.num_pending, room)
            if query_len:
                batch.add(copy, query_len)
                room -= query_len
        return batch

    def _drafts(self, copy: Sequence) -> list[int]:
        """The drafts of a copy, up to the first token that only the draft model knows."""
        drafts = copy.tokens[self._num_known[copy] :]
        return list(takewhile(lambda token_id: token_id < self._limits.vocab_size, drafts))


def draft_folder(options: EngineOptions, folder: ModelFolder) -> ModelFolder | None:
    """The folder of the draft model, checked against the model that it drafts for; None if no draft
    model is set. Reads no weight. Raises EngineOptionError, ModelError, UnsupportedModel.
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
    # The numbers of logits may differ, as padding differs between sizes of a family. Both models
    # must read token ids alike.
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
