"""Makes and checks the grammars of requests without stalling the event loop."""

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import anyio
import msgspec
from msgspec.structs import replace

from sagellm.chat_formats import ChatFormat, SpecialTokens, ToolSpec, ToolUse, UnboundSchema
from sagellm.chat_formats.tool_schema import schema_of
from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.threads import NoThread, Overrun, WorkerThreads
from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.sampling import Grammar

CHECK_S = 0.25  # CPU time for the grammar of one request; more is refused as its fault
WAIT_S = 10.0  # wall time with the wait for a thread; more means an overloaded server
RETRY_S = 1.0
_NUM_THREADS = 2  # late work keeps its thread
_FEWER = "send fewer tools, or bind none of their calls: `tool_choice` `auto`, and no `strict`"
_PLACE = re.compile(r" \((line \d+, column \d+|at \$[^)]*)\)")
T = TypeVar("T")
ToolSpecs: TypeAlias = tuple[ToolSpec, ...]


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
            cure = _FEWER if param == "tools" else "make it smaller"
            late = f"its grammar takes more than {CHECK_S:g} s of CPU time to compile; {cure}"
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
    names: Sequence[str],
    special_tokens: SpecialTokens,
    response: Grammar | None = None,
) -> Grammar | None:
    """Return the grammar of answers that call tools; None if any text may be an answer.

    `names`: those of the request's tools, of which `use` may have some. `response`: the checked
    grammar of an answer that calls no tool; None: any text. Raises ApiError (400) that names the
    first tool whose parameters cannot be a grammar. Blocks the thread.
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
    tools, reason = _faulty(use.tools, reason, lambda some: make(replace(use, tools=some)))
    reason = _PLACE.sub("", reason)  # of our grammar around the schemas
    if len(tools) > 1:
        raise invalid_grammar("tools", f"{reason}; {_FEWER}")
    place = f"tools[{names.index(tools[0].name)}].function.parameters"
    raise invalid_grammar(place, _own_fault(tools[0]) or reason)


def _own_fault(tool: ToolSpec) -> str:
    """The fault of a tool's parameters by themselves, with its place in them; "" for none."""
    try:
        schema = msgspec.json.encode(schema_of(tool)).decode()
        check_grammar(Grammar(kind="json_schema", text=schema))
    except (GrammarError, RecursionError) as error:
        return str(error) if isinstance(error, GrammarError) else ""
    return ""


def _faulty(
    tools: ToolSpecs, reason: str, make: Callable[[ToolSpecs], Grammar | None]
) -> tuple[ToolSpecs, str]:
    """Return the first of the tools whose grammar has a fault, and the fault.

    Several tools are returned if their grammar has a fault that no half of them has. `reason`: the
    fault of all tools.
    """
    if len(tools) == 1:
        return tools, reason
    middle = len(tools) // 2
    for half in (tools[:middle], tools[middle:]):
        try:
            make(half)
        except (GrammarError, UnboundSchema) as error:
            return _faulty(half, str(error), make)
    return tools, reason
