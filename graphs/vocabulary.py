"""The ops of a dialect, declared as data: a graph can be checked without the code of its ops."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_type_hints

# Item types of stream edges. An inlet or outlet may name several with "|"; "any" is every type.
REQUEST = "request"  # a prompt and its sampling options
PREFILLED = "prefilled"  # a request, its first token and the lease on its KV blocks
EVENT = "event"  # tokens of an answer, or its end
ANSWER = "answer"  # the whole answer to one request
EMBEDDING = "embedding"  # the vector of a text, as the one event of its choice
ANY = "any"

SHADOW = "shadow"  # the key of an operator whose value has the options of its shadow
SIGNALS = frozenset({"cancel", "expire", "forget"})  # signals overtake items on an edge

# Capabilities of engines: a kind of engine offers them; operators and requests need them.
TOKENS_IN = "tokens_in"  # prompts are token ids of its model
TEXT_IN = "text_in"  # prompts are text, or messages
TOKENS_OUT = "tokens_out"  # events have token ids
TEXT_OUT = "text_out"  # events have text
KV_TRANSFER = "kv_transfer"  # exports and imports KV blocks
RESUME = "resume"  # continues a sequence that another engine began
LOGPROBS = "logprobs"  # gives logprobs of sampled tokens and of prompt tokens
GRAMMARS = "grammars"  # masks tokens that leave the grammar of a request
EMBED = "embed"  # gives the vector of a prompt instead of an answer
CAPABILITIES = (
    TOKENS_IN,
    TEXT_IN,
    TOKENS_OUT,
    TEXT_OUT,
    KV_TRANSFER,
    RESUME,
    LOGPROBS,
    GRAMMARS,
    EMBED,
)


@dataclass(frozen=True, slots=True)
class Port:
    """An inlet or an outlet of an op.

    `carries`: item types, joined by `|`. An outlet of `same` carries the types of the first inlet.
    `aliases`: further names that the edges of a graph may use for an outlet.
    """

    name: str
    carries: str = ANY
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ListedPorts:
    """Outlets whose names the option `option` of the op lists. All carry the same item types."""

    option: str
    carries: str = ANY

    def ports(self, given: Mapping[str, object]) -> tuple[Port, ...]:
        """The listed outlets of an op with the options `given`. Each name counts once."""
        names = given.get(self.option)
        listed = names if isinstance(names, tuple | list) else ()
        texts = dict.fromkeys(name for name in listed if isinstance(name, str))
        return tuple(Port(name, self.carries) for name in texts)


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of an op that has none."""


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One op: its inlets and outlets, the frozen dataclass of its options, and its properties.

    `role`: "logic" (pure), "service" (owns an engine, a socket, a file) or "kernel". `engine`: the
    op has an option `engine` that names an engine. `needs`: the capabilities that the engine must
    have; either capability of "a|b" is enough.
    `subscribes`: the kinds of feedback that the operator receives, and "topology". `signals`: the
    kinds of signal that the operator receives; an operator without state per request needs none.
    `queues`: requests wait in the operator, and a request returns to it if its engine is lost.
    `drops_tokens`: the operator may leave out tokens of an answer. `listed_outlets`: further
    outlets, which an option lists. `decides`: what the operator decides about a request, such as
    "order"; only such an operator can have a `shadow`.
    """

    name: str
    inlets: tuple[Port, ...] = (Port("in"),)
    outlets: tuple[Port, ...] = (Port("out"),)
    options: type = NoOptions
    role: str = "logic"
    engine: bool = False
    needs: frozenset[str] = frozenset()
    subscribes: frozenset[str] = frozenset()
    signals: frozenset[str] = SIGNALS
    queues: bool = False
    drops_tokens: bool = False
    listed_outlets: ListedPorts | None = None
    decides: str = ""

    def with_options(self, given: Mapping[str, object]) -> "OpSpec":
        """The spec of an operator with the options `given`: its `outlets` include listed ones."""
        if self.listed_outlets is None:
            return self
        listed = self.listed_outlets.ports(given)
        return replace(self, outlets=(*self.outlets, *listed), listed_outlets=None)

    def inlet(self, name: str) -> Port | None:
        return next((port for port in self.inlets if port.name == name), None)

    def outlet(self, name: str) -> Port | None:
        """The outlet whose name or alias is `name`."""
        return next((port for port in self.outlets if name in (port.name, *port.aliases)), None)

    @property
    def option_types(self) -> dict[str, Any]:
        """The type annotation of each option, by name."""
        if not is_dataclass(self.options):
            raise TypeError(f"options of {self.name} must be a dataclass")
        hints = get_type_hints(self.options)
        return {option.name: hints[option.name] for option in fields(self.options)}


def unmet_needs(needs: Iterable[str], offered: frozenset[str]) -> tuple[str, ...]:
    """The needs that `offered` does not meet, sorted. A need "a|b" is met by either capability."""
    return tuple(sorted(need for need in needs if not offered.intersection(need.split("|"))))


class Vocabulary(Mapping[str, OpSpec]):
    """The ops that a graph may use, by name."""

    def __init__(self, specs: Mapping[str, OpSpec]) -> None:
        self._specs = dict(specs)

    def __getitem__(self, name: str) -> OpSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def nearest(name: str, known: "Mapping[str, object] | tuple[str, ...] | list[str]") -> str | None:
    """The known name that is most similar to `name`; None if none is as close as a typing error."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return close[0] if close else None
