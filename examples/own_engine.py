"""A kind of engine of your own: it repeats the prompt, a word a token, and speaks text only."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

import sagellm
from sagellm import Graph, ops
from sagellm.runtime.engine.kinds import EngineKind, ReplicaPlace
from sagellm.runtime.engine.output import Mailbox, StopStrings
from sagellm.runtime.messages import FinishReason, SequenceState, TokenEvent
from sagellm.runtime.port import EngineEvent, EngineFacts, EngineHealth, EngineLoad, EngineRefusal

CAPABILITIES = frozenset({"text_in", "text_out", "resume"})
Key = tuple[str, int, int]  # request id, choice, epoch


@dataclass(frozen=True)
class Options:
    """What a graph says of such an engine; each option has a default, or must be given."""

    model: str = "parrot"
    replicas: int = field(default=1, metadata={"min": 1})
    word_s: float = field(default=0.01, metadata={"min": 0})


class Answer:
    """One sequence. It goes on after the text that was emitted of it before, if any was."""

    def __init__(self, state: SequenceState) -> None:
        sampling = state.sampling
        words = (state.prompt or str(state.messages[-1]["content"])).split()
        turn = state.choice % len(words)
        self.state = state
        self.words = [*words[turn:], *words[:turn]]
        self.said = len(state.emitted_text.split())
        self.position = state.num_emitted  # of the next token that is emitted
        self.stops = StopStrings(sampling.stop, keep_stop=sampling.include_stop_str_in_output)

    def next_event(self) -> TokenEvent | None:
        """Say one more word; None while what was said may be the beginning of a stop string."""
        text, stop = self.stops.push(self.words[self.said] + " ")
        self.said += 1
        reason = self._reason(stop)
        if reason is not None and stop is None:
            rest, stop = self.stops.finish()
            text += rest
        return self.event(text, reason, stop) if text or reason else None

    def event(
        self, text: str = "", reason: FinishReason | None = None, stop: str | None = None
    ) -> TokenEvent:
        """The words that were not emitted yet; no ids of them are known. What may be the beginning
        of a stop string is not counted when the answer is cancelled.
        """
        position = self.position
        self.position = position if reason == "cancelled" else self.said
        return TokenEvent(
            request_id=self.state.request_id,
            choice=self.state.choice,
            epoch=self.state.epoch,
            position=position,
            num_tokens_without_ids=self.position - position,
            text=text,
            finish_reason=reason,
            stop_reason=stop,
            num_prompt_tokens=len(self.words),
        )

    def _reason(self, stop: str | None) -> FinishReason | None:
        if stop is not None or self.said == len(self.words):
            return "stop"
        return "length" if self.said >= self.state.sampling.max_tokens else None


class Parrot:
    """Implements the port `Engine`. It moves no KV blocks, so it has neither export nor import."""

    def __init__(self, options: Options) -> None:
        self.facts = EngineFacts(
            model=options.model, max_model_len=4096, max_num_seqs=16, capabilities=CAPABILITIES
        )
        self._word_s = options.word_s
        self._answers: dict[Key, Answer] = {}
        self._mailboxes: dict[str, Mailbox] = {}
        self._has_work = trio.Event()
        self._is_stopped = False

    async def submit(self, state: SequenceState) -> None:
        await trio.lowlevel.checkpoint()
        if self._is_stopped:
            raise EngineRefusal("the parrot sleeps", "shutting_down")
        self._answers[state.request_id, state.choice, state.epoch] = Answer(state)
        self._has_work.set()

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        answer = self._answers.pop((request_id, choice, epoch), None)
        if answer is not None:
            mailbox = self._mailbox(answer.state.owner)
            mailbox.post(answer.event(reason="cancelled"))
            mailbox.flush()

    def events(self, owner: str) -> AsyncIterator[tuple[EngineEvent, ...]]:
        return self._mailbox(owner)

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(num_running=len(self._answers))

    @property
    def health(self) -> EngineHealth:
        return EngineHealth()

    async def idle(self) -> None:
        await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        try:
            while True:
                self._has_work = trio.Event()
                if not self._answers:
                    await self._has_work.wait()
                await trio.sleep(self._word_s)
                self._step()
        finally:
            self._is_stopped = True
            for mailbox in self._mailboxes.values():
                mailbox.close()

    def _step(self) -> None:
        for key, answer in tuple(self._answers.items()):
            mailbox = self._mailbox(answer.state.owner)
            event = None if mailbox.is_full else answer.next_event()
            if event is not None:
                mailbox.post(event)
                if event.is_last:
                    del self._answers[key]
        for mailbox in self._mailboxes.values():
            mailbox.flush()

    def _mailbox(self, owner: str) -> Mailbox:
        return self._mailboxes.setdefault(owner, Mailbox(lambda: None))


async def open_parrot(options: Options, place: ReplicaPlace) -> Parrot:
    """One replica, ready for `run`; `place` says which."""
    await trio.lowlevel.checkpoint()
    return Parrot(options)


sagellm.register_engine_kind("parrot", EngineKind(Options, CAPABILITIES, open_parrot))


async def main() -> None:
    graph = Graph("g").engine("e", kind="parrot") >> ops.policy_sort() >> ops.generate(engine="e")
    async with graph.open() as session:
        answer = await session.generate("a graph of operators")
        print(answer.text)


if __name__ == "__main__":
    trio.run(main)
