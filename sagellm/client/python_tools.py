"""Python functions as tools of a model: their JSON schemas, and the calls that a model asks for."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, get_type_hints

import anyio
import anyio.to_thread
import docstring_parser
import msgspec

from sagellm.client.replies import ResponseToolCall
from sagellm.client.responses import MISUSED, ClientError
from sagellm.client.type_schemas import is_strict, schema_of
from sagellm.graphs.vocabulary import nearest

ToolCallable: TypeAlias = Callable[..., Any]
# Gets the failed call and its error. Returns the text that the model reads; None: the usual text.
OnError: TypeAlias = Callable[[ResponseToolCall, Exception], str | None]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # as in the OpenAI API
_NAMED_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, slots=True)
class PythonTool:
    """A function that a model may call. `decoder`: reads arguments, as a struct with one field a
    parameter.
    """

    function: ToolCallable
    name: str
    description: str
    parameters: Mapping[str, Any]
    decoder: msgspec.json.Decoder[msgspec.Struct]

    @property
    def plain(self) -> dict[str, Any]:
        """The tool as a call's field `tools` has it."""
        function: dict[str, Any] = {"name": self.name, "parameters": self.parameters}
        if self.description:
            function["description"] = self.description
        if is_strict(self.parameters):  # a server may refuse `strict` for optional parameters
            function["strict"] = True
        return {"type": "function", "function": function}

    def bind(self, arguments: str) -> Callable[[], Any]:
        """The function with its arguments, converted to the annotated types.

        Raises ValueError for arguments that do not fit.
        """
        read = self.decoder.decode(arguments)
        return partial(self.function, **msgspec.structs.asdict(read))


def read_tool(function: ToolCallable, name: str | None = None) -> PythonTool:
    """Read name, types and docstring of a function. Raises ClientError for one that is no tool.

    A decorated function and a partial object are read as the function inside. `name`: in place of
    the function's own. The description is the docstring before its sections. A parameter's
    description is that of its `Meta`, or else its line of the docstring.
    """
    if not callable(function):
        raise ClientError(f"{type(function).__name__} is no function to call", code=MISUSED)
    inner, given = _function_inside(function)
    name = name or str(getattr(inner, "__name__", type(inner).__name__))
    if not _NAME.fullmatch(name):
        raise _unfit(name, "a tool's name has letters, digits, _ and -, at most 64")
    arguments = _arguments_of(name, function, inner, given)
    try:
        schema, decoder = schema_of(arguments), msgspec.json.Decoder(arguments)
    except TypeError as error:
        raise _unfit(name, f"a parameter's type cannot be JSON: {error}") from None
    doc = docstring_parser.parse(inspect.getdoc(inner) or "")
    for param in doc.params:
        if (known := schema["properties"].get(param.arg_name)) is not None:
            known.setdefault("description", param.description or "")
    schema.pop("title", None)  # the tool's name again
    return PythonTool(function, name, (doc.description or "").strip(), schema, decoder)


def _function_inside(function: ToolCallable) -> tuple[ToolCallable, set[str]]:
    """The function inside of decorators and partial objects, and the names of the arguments that
    partial objects give. Decorators keep the function as `functools.wraps` does.

    Raises ClientError for an object that wraps itself, as those do that have every attribute.
    """
    given: set[str] = set()
    try:
        inner = inspect.unwrap(function)
        while isinstance(inner, partial):
            given |= inner.keywords.keys()
            inner = inspect.unwrap(inner.func)
    except ValueError:
        raise _unfit(type(function).__name__, "it wraps itself; give a function") from None
    return inner, given


def _arguments_of(
    name: str, function: ToolCallable, inner: ToolCallable, given: set[str]
) -> type[msgspec.Struct]:
    """A struct with a field for each parameter that the model gives. Raises ClientError."""
    try:
        hints = get_type_hints(_annotated(inner), include_extras=True)
        parameters = inspect.signature(function).parameters.values()
    except (NameError, TypeError, ValueError) as error:
        raise _unfit(name, f"its signature cannot be read: {error}") from None
    fields: list[Any] = []
    for each in parameters:
        if each.name in given:
            continue
        if each.kind not in _NAMED_KINDS:
            raise _unfit(name, f"parameter {each} cannot be given by name")
        if each.name not in hints:
            raise _unfit(name, f"parameter {each.name} has no type; annotate it")
        field = (each.name, hints[each.name])
        is_needed = each.default is inspect.Parameter.empty
        fields.append(field if is_needed else (*field, _default_field(each.default)))
    return msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)


def _annotated(function: ToolCallable) -> ToolCallable:
    """The object with a function's annotations: of other objects, `__call__` of the class."""
    is_function = inspect.isroutine(function) or inspect.isclass(function)
    return function if is_function else type(function).__call__


def _default_field(default: Any) -> Any:
    # By a factory: msgspec would refuse a mutable default, which a Python function may have.
    return msgspec.field(default_factory=lambda: default)


def _unfit(name: str, cause: str) -> ClientError:
    return ClientError(f"{name} is no tool: {cause}", code=MISUSED)


def plain_tools(tools: Sequence[Any]) -> list[Any]:
    """The field `tools` of a call: functions are read, dicts stay as they are."""
    return [read_tool(each).plain if callable(each) else each for each in tools]


class ToolBox:
    """Runs the calls of a model. A call that fails gives a text that says why, so that the model
    can correct the call.
    """

    def __init__(
        self, functions: Sequence[ToolCallable | PythonTool], on_error: OnError | None = None
    ) -> None:
        tools = [each if isinstance(each, PythonTool) else read_tool(each) for each in functions]
        self._tools = {each.name: each for each in tools}
        self._on_error = on_error
        if len(self._tools) < len(tools):
            raise ClientError("two tools have one name; rename one of them", code=MISUSED)

    @property
    def plain(self) -> list[dict[str, Any]]:
        """The tools as a call's field `tools` has them."""
        return [tool.plain for tool in self._tools.values()]

    def run(self, call: ResponseToolCall) -> str:
        """The text of a call's result. An async function gets an asyncio loop of its own.

        Raises what `on_error` raises, and ClientError for a result that is no JSON.
        """
        try:
            value = self._bound(call)()
            if inspect.isawaitable(value):
                value = anyio.run(_awaited, value)
        except Exception as error:
            return self._failure_text(call, error)
        return text_of(value, call.name)

    async def run_async(self, call: ResponseToolCall) -> str:
        """Like `run`, in an event loop. A function that is not async runs in a thread."""
        try:
            bound = self._bound(call)
            is_async = inspect.iscoroutinefunction(self._tools[call.name].function)
            value = bound() if is_async else await anyio.to_thread.run_sync(bound)
            if inspect.isawaitable(value):
                value = await value
        except Exception as error:
            return self._failure_text(call, error)
        return text_of(value, call.name)

    def _bound(self, call: ResponseToolCall) -> Callable[[], Any]:
        tool = self._tools.get(call.name)
        if tool is None:
            close = nearest(call.name, self._tools)
            hint = f"did you mean {close}?" if close else f"there are {', '.join(self._tools)}"
            raise LookupError(f"there is no tool of this name; {hint}")
        return tool.bind(call.arguments)

    def _failure_text(self, call: ResponseToolCall, error: Exception) -> str:
        """The text that the model reads. Raises what `on_error` raises."""
        text = None if self._on_error is None else self._on_error(call, error)
        return f"Error: {type(error).__name__}: {error}" if text is None else text


async def _awaited(value: Any) -> Any:
    return await value


def text_of(value: Any, name: str) -> str:
    """The text of a tool's result: a `str` unchanged, any other value as JSON.

    Raises ClientError for a value that JSON cannot hold.
    """
    if isinstance(value, str):
        return value
    try:
        compact = msgspec.json.encode(value, enc_hook=_pydantic_fields)
        # With a blank after `,` and `:`, as in the data that models are trained on.
        return msgspec.json.format(compact, indent=0).decode()
    except (TypeError, ValueError, RecursionError) as error:
        cause = f"{name} returned a value that JSON cannot hold: {error}; return text or JSON"
        raise ClientError(cause, code=MISUSED) from error


def _pydantic_fields(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no JSON form")
