"""What ops a dialect knows: declared as data, so that a graph is checked without its code."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_type_hints

# What a stream edge carries. `any` accepts each of them; a port may name several with "|".
REQUEST = "request"  # a prompt and how to answer it
PREFILLED = "prefilled"  # a request, its first token and a lease on its KV blocks
EVENT = "event"  # tokens of one request, or its end
ANSWER = "answer"  # the whole answer to one request
ANY = "any"

SIGNALS = frozenset({"cancel", "expire", "forget"})  # what overtakes items

# What an engine may be able to do: its kind declares it, an operator or a request needs it.
TOKENS_IN = "tokens_in"  # takes a prompt as token ids of its model
TEXT_IN = "text_in"  # takes a prompt as text, or as messages
TOKENS_OUT = "tokens_out"  # its events have token ids
TEXT_OUT = "text_out"  # its events have text
KV_TRANSFER = "kv_transfer"  # exports KV blocks to, and imports them from, another engine
RESUME = "resume"  # goes on with a sequence of which tokens were emitted elsewhere
LOGPROBS = "logprobs"  # gives log probabilities of sampled tokens and of a prompt's tokens
CAPABILITIES = (TOKENS_IN, TEXT_IN, TOKENS_OUT, TEXT_OUT, KV_TRANSFER, RESUME, LOGPROBS)


@dataclass(frozen=True, slots=True)
class Port:
    """An inlet or outlet. `carries` names item types joined by `|`; `same` = the first inlet's.

    `aliases`: further names that the edges of a graph may use for an outlet.
    """

    name: str
    carries: str = ANY
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ListedPorts:
    """Ports that an option of the op lists by name; all of them carry the same."""

    option: str
    carries: str = ANY

    def ports(self, given: Mapping[str, object]) -> tuple[Port, ...]:
        """Those of an op with these options, each name once; none where the option lists none."""
        names = given.get(self.option)
        listed = names if isinstance(names, tuple | list) else ()
        texts = dict.fromkeys(name for name in listed if isinstance(name, str))
        return tuple(Port(name, self.carries) for name in texts)


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of an op that has none."""


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One op: its ports, the frozen dataclass of its options, and its role.

    `role` is "logic" (pure), "service" (owns something outside) or "kernel". `engine` says that
    the op refers to an engine by the option `engine`; `needs` are the capabilities that this engine
    must have, where "a|b" stands for either of two.
    `subscribes`: the kinds of feedback, and "topology", that it is given. `signals`: the kinds of
    signal that it is given; an operator that holds nothing of a request needs none. `queues`:
    requests wait in it, and a request whose engine was lost comes back to it. `drops_tokens`: it
    may leave tokens of an answer out. `listed_outlets`: further outlets, which an option names.
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

    def with_options(self, given: Mapping[str, object]) -> "OpSpec":
        """The spec of one operator with these options: its `outlets` are all that it has."""
        if self.listed_outlets is None:
            return self
        listed = self.listed_outlets.ports(given)
        return replace(self, outlets=(*self.outlets, *listed), listed_outlets=None)

    def inlet(self, name: str) -> Port | None:
        return next((port for port in self.inlets if port.name == name), None)

    def outlet(self, name: str) -> Port | None:
        """The outlet of that name or alias."""
        return next((port for port in self.outlets if name in (port.name, *port.aliases)), None)

    @property
    def option_types(self) -> dict[str, Any]:
        """Option name -> its type annotation."""
        if not is_dataclass(self.options):
            raise TypeError(f"options of {self.name} must be a dataclass")
        hints = get_type_hints(self.options)
        return {option.name: hints[option.name] for option in fields(self.options)}


def unmet_needs(needs: Iterable[str], offered: frozenset[str]) -> tuple[str, ...]:
    """The needs that are not met, in order of the alphabet; "a|b" is met by either."""
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
    """The known name most like `name`, if any is close enough to be a slip of the hand."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return close[0] if close else None
