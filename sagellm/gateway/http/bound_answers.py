"""The grammar of an answer: from the tools and the structured output of a request."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from sagellm.chat_formats import ToolUse
from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.gateway import HostedModel
from sagellm.gateway.grammar_checks import call_grammar
from sagellm.gateway.protocol.bodies import ChatRequest, CompletionRequest
from sagellm.gateway.protocol.structured_outputs import constraint_of, grammar_of
from sagellm.gateway.settings import Settings
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.sampling import Grammar

T = TypeVar("T")


class GrammarRunner(Protocol):
    """Runs what makes and checks one grammar. See `GrammarChecker`."""

    async def run(self, param: str, work: Callable[[], T]) -> T: ...


class GrammarGateway(Protocol):
    """A gateway, as the grammars of its requests need it."""

    @property
    def settings(self) -> Settings: ...

    @property
    def grammars(self) -> GrammarRunner: ...


async def response_grammar(
    gateway: GrammarGateway,
    served: HostedModel,
    asked: CompletionRequest | ChatRequest,
    prompt: str | None = None,
) -> Grammar | None:
    """Return the checked grammar that the fields of structured output give; None: they give none.

    `prompt`: that of a chat, whose answer may begin with reasoning. Raises ApiError.
    """
    constraint = constraint_of(asked)
    if constraint is None:
        return None
    _check_able(served, constraint.param)
    max_depth = gateway.settings.limits.json_depth

    def make() -> Grammar:
        grammar = grammar_of(constraint, max_depth)
        if prompt is not None:
            special = served.special_tokens
            grammar = served.format.response_grammar(grammar, prompt, special_tokens=special)
        check_grammar(grammar)
        return grammar

    return await gateway.grammars.run(constraint.param, make)


async def chat_grammar(
    gateway: GrammarGateway, served: HostedModel, asked: ChatRequest, use: ToolUse, prompt: str
) -> Grammar | None:
    """Return the checked grammar of a chat's answer, which calls tools as `use` says.

    `check_tool_use` has passed. Raises ApiError.
    """
    if not use.allowed:
        return await response_grammar(gateway, served, asked, prompt)
    # An answer that must be calls is no text of a response format.
    response = None if use.must_call else await response_grammar(gateway, served, asked)
    if not use.needs_grammar(response):
        return None

    names = [tool.function.name for tool in asked.tools]

    def make() -> Grammar | None:
        special = served.special_tokens
        form = served.format
        return call_grammar(
            form, use, prompt, names=names, special_tokens=special, response=response
        )

    return await gateway.grammars.run("tools", make)


def check_tool_use(served: HostedModel, use: ToolUse) -> None:
    """Raise ApiError (400) for tools that the model or its engine cannot be given."""
    if not use.allowed:
        return
    if not served.format.takes_tools:
        why = (
            "the chat template of this model knows no tools, or only a form of calls not known here"
        )
        cure = "leave them out, or choose `none` in `tool_choice`"
        raise _unsupported("tools", f"{why}; {cure}")
    if use.is_bound:
        if use.must_call:
            _check_able(served, "tool_choice", "choose `auto`")
        else:
            _check_able(served, "tools", "leave `strict` out")


def _check_able(served: HostedModel, param: str, cure: str = "leave it out") -> None:
    """Raise ApiError (400) if an engine of the model binds no answer to a grammar."""
    if not served.card.takes_grammars:
        raise _unsupported(param, f"an engine of this model binds no answer to a grammar; {cure}")


def _unsupported(param: str, message: str) -> ApiError:
    return wrong(param, message, "unsupported_parameter")
