"""Makes and checks the grammars of requests without stalling the event loop."""

import re
from collections.abc import Callable
from typing import TypeVar

import anyio
import msgspec

from sagellm.chat_formats import ChatFormat, SpecialTokens, ToolUse, UnboundSchema
from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.threads import NoThread, Overrun, WorkerThreads
from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.sampling import Grammar

CHECK_S = 0.25  # CPU time for the grammar of one request; more is refused as its fault
WAIT_S = 10.0  # wall time with the wait for a thread; more means an overloaded server
RETRY_S = 1.0
_NUM_THREADS = 2  # late work keeps its thread
_PLACE = re.compile(r" \((line \d+, column \d+|at \$[^)]*)\)")
T = TypeVar("T")


class GrammarChecker:
    """Checks grammars in worker threads. Works on trio and on asyncio."""

    def __init__(self) -> None:
        self._threads = WorkerThreads(_NUM_THREADS)

    async def run(self, param: str, work: Callable[[], T]) -> T:
        """Return what `work` returns, which makes and checks one grammar.

        `param`: the field of the request that errors name. Raises ApiError: 400 if the work raises
        GrammarError or takes too long, and what the work raises.
        """
        try:
            with anyio.fail_after(WAIT_S):
                return await self._threads.run_within(CHECK_S, work)
        except GrammarError as error:
            raise invalid_grammar(param, str(error)) from None
        except Overrun:
            late = f"it takes more than {CHECK_S:g} s of CPU time to compile"
            raise invalid_grammar(param, late) from None
        except (NoThread, TimeoutError):
            late = "the grammar could not be checked in time"
            raise ApiError(503, late, code="grammar_busy", retry_after_s=RETRY_S) from None


def invalid_grammar(param: str, reason: str) -> ApiError:
    return wrong(param, reason, "invalid_grammar")


def call_grammar(
    form: ChatFormat,
    use: ToolUse,
    prompt: str,
    *,
    special_tokens: SpecialTokens,
    response: Grammar | None = None,
) -> Grammar | None:
    """Return the grammar of answers that call tools; None if any text may be an answer.

    `response`: the checked grammar of an answer that calls no tool; None: any text. Raises ApiError
    (400) that names the first tool whose parameters cannot be a grammar. Blocks the thread.
    """

    def make(use: ToolUse) -> Grammar | None:
        try:
            grammar = form.grammar(use, prompt, response=response, special_tokens=special_tokens)
        except RecursionError:
            raise GrammarError("its schemas lead to each other too deeply") from None
        if grammar is not None:
            check_grammar(grammar)
        return grammar

    try:
        return make(use)
    except (GrammarError, UnboundSchema) as error:
        reason = str(error)
    for index, tool in enumerate(use.tools):
        try:
            make(msgspec.structs.replace(use, tools=(tool,)))
        except (GrammarError, UnboundSchema) as error:
            # Places are those in our grammar around the schema.
            reason = _PLACE.sub("", str(error))
            raise invalid_grammar(f"tools[{index}].function.parameters", reason) from None
    raise invalid_grammar("tools", reason)
