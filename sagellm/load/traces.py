"""Traces: files of requests, in formats that others publish and in our own."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import chain
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta

from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.messages import NORMAL, PRIORITIES

BLOCK_LEN = 512  # number of tokens that a hash id of a Mooncake trace stands for
FORMATS_FIX = "docs/serving.md lists the formats of traces"
_LINE_FIX = "correct the line, or delete it"


class TraceError(ValueError):
    """The error for an unreadable workload. The message has the line and the cause.

    `fix`: the change to suggest to the user.
    """

    def __init__(self, message: str, fix: str = FORMATS_FIX) -> None:
        super().__init__(message)
        self.fix = fix


class PlannedRequest(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The plan of one request: `at_s`, seconds after the first request, and lengths in tokens.

    Each of `block_ids` stands for BLOCK_LEN tokens of the prompt: requests whose first block ids
    are equal share a prefix. `priority` is 0 (critical) to 4 (background). `cost_budget`: the value
    of the request to its caller; None: 1.
    """

    at_s: float
    input_len: int
    output_len: int
    block_ids: tuple[int, ...] = ()
    user_id: str = ""
    priority: int = NORMAL
    slo_ttft_s: float | None = None
    model: str = ""
    cost_budget: float | None = None


_Length: TypeAlias = Annotated[int, Meta(ge=1)]
_Priority: TypeAlias = Annotated[int, Meta(ge=0, le=max(PRIORITIES.values()))]


class _Mooncake(msgspec.Struct, frozen=True):
    timestamp: Annotated[float, Meta(ge=0)]  # ms
    input_length: _Length
    output_length: Annotated[int, Meta(ge=0)]
    hash_ids: tuple[int, ...] = ()

    def planned(self) -> PlannedRequest:
        # An answer has at least one token: `max_tokens` 0 is no valid request.
        output_len = max(1, self.output_length)
        return PlannedRequest(self.timestamp / 1e3, self.input_length, output_len, self.hash_ids)


class _Own(msgspec.Struct, frozen=True):
    """A line of our own format."""

    at_s: Annotated[float, Meta(ge=0)]
    input_len: _Length
    output_len: _Length
    block_ids: tuple[int, ...] = ()
    user_id: str = ""
    priority: _Priority | str = NORMAL
    slo_ttft_s: Annotated[float, Meta(gt=0)] | None = None
    model: str = ""
    cost_budget: Annotated[float, Meta(ge=0)] | None = None

    def planned(self) -> PlannedRequest:
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return PlannedRequest(**{**values, "priority": read_priority(self.priority)})


def read_priority(given: int | str) -> int:
    """The number of a priority, given as number or name. Raises ValueError."""
    name = str(given)
    if name.isdecimal() and int(name) in PRIORITIES.values():
        return int(name)
    if name not in PRIORITIES:
        close = nearest(name, PRIORITIES)
        hint = f"did you mean {close}?" if close else f"there are {', '.join(PRIORITIES)}"
        raise ValueError(f"no priority {name!r}: {hint}")
    return PRIORITIES[name]


def read_trace(path: Path) -> list[PlannedRequest]:
    """Read a trace; its first line tells the format.

    The requests are sorted by time, and the first has time 0. Raises TraceError, OSError.
    """
    found = sorted(stream_trace(path), key=lambda planned: planned.at_s)
    if not found:
        raise TraceError("the trace holds no request")
    start_s = found[0].at_s
    if not start_s:
        return found
    return [msgspec.structs.replace(one, at_s=one.at_s - start_s) for one in found]


def stream_trace(path: Path) -> Iterator[PlannedRequest]:
    """The requests of a trace, in the order and with the times of the file, read line by line.

    Raises TraceError, OSError.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        first = file.readline()
        read = _json_lines if first.lstrip().startswith("{") else _csv_rows
        yield from read(chain((first,), file))


def write_trace(path: Path, requests: Iterable[PlannedRequest]) -> None:
    """Write requests in our own format. Fields with their default are left out."""
    with path.open("wb") as file:
        for planned in requests:
            file.write(msgspec.json.encode(planned) + b"\n")


def _json_lines(lines: Iterable[str]) -> Iterator[PlannedRequest]:
    decode: Callable[[str], _Own | _Mooncake] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            decode = decode or _decoder(line)
            yield decode(line).planned()
        except TraceError:
            raise
        except ValueError as error:
            raise TraceError(f"line {number}: {error}", _LINE_FIX) from None


def _decoder(line: str) -> Callable[[str], _Own | _Mooncake]:
    """The decoder of the lines of a trace whose first line is given. Raises ValueError."""
    if line.strip() == "{":
        fix = "give JSON lines, or the requests.csv beside a bench.json"
        raise TraceError("line 1: the object does not end in its line", fix)
    names = msgspec.json.decode(line, type=dict[str, Any])
    if "timestamp" in names:
        return msgspec.json.Decoder(_Mooncake).decode
    if "at_s" in names:
        return _decode_own
    raise TraceError("line 1: neither `at_s` (our format) nor `timestamp` (Mooncake's)")


def _decode_own(line: str) -> _Own:
    """A line of our own format. Raises ValueError, also for a field that the format lacks."""
    fields = msgspec.json.decode(line, type=dict[str, Any])
    for name in fields.keys() - set(_Own.__struct_fields__):
        close = nearest(name, _Own.__struct_fields__)
        hint = f"did you mean `{close}`?" if close else f"there are {_listed(_Own)}"
        raise ValueError(f"no field `{name}`: {hint}")
    return msgspec.convert(fields, _Own)


def _listed(kind: type[msgspec.Struct]) -> str:
    return ", ".join(kind.__struct_fields__)


Row: TypeAlias = Mapping[str, str]


class _Table(NamedTuple):
    """A CSV format: the columns that tell it, and the request of a row; None: no request."""

    columns: tuple[str, ...]
    planned: Callable[[Row], PlannedRequest | None]


def _azure(row: Row) -> PlannedRequest:
    at_s = _utc(datetime.fromisoformat(row["TIMESTAMP"].strip())).timestamp()
    lengths = _count(row, "ContextTokens"), _count(row, "GeneratedTokens")
    return PlannedRequest(at_s, max(1, lengths[0]), max(1, lengths[1]))


def _burstgpt(row: Row) -> PlannedRequest | None:
    """A row of BurstGPT; None for a request that failed there, which has no answer."""
    lengths = _count(row, "Request tokens"), _count(row, "Response tokens")
    if not lengths[1]:
        return None
    at_s = _seconds(row, "Timestamp")
    return PlannedRequest(at_s, max(1, lengths[0]), lengths[1], model=row["Model"].strip())


def _measured(row: Row) -> PlannedRequest:
    """A row of requests.csv, which `sagellm bench serve --output` writes."""
    input_len = _count(row, "prompt_tokens" if row.get("prompt_tokens") else "input_len")
    return PlannedRequest(
        _seconds(row, "planned_s"), max(1, input_len), max(1, _count(row, "output_len"))
    )


_TABLES = {
    "Azure": _Table(("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _azure),
    "BurstGPT": _Table(("Timestamp", "Model", "Request tokens", "Response tokens"), _burstgpt),
    "bench": _Table(("planned_s", "input_len", "output_len"), _measured),
}


def _csv_rows(lines: Iterable[str]) -> Iterator[PlannedRequest]:
    rows = csv.DictReader(lines, restval="")
    try:
        table = _table(rows.fieldnames or ())
        for row in rows:
            planned = table.planned(row)
            if planned is not None:
                yield planned
    except TraceError:
        raise
    except (ValueError, csv.Error) as error:
        raise TraceError(f"line {rows.reader.line_num}: {error}", _LINE_FIX) from None


def _table(header: Iterable[str]) -> _Table:
    """The format of a header: the one that has most of its columns. Raises TraceError."""
    found = set(header)
    table = max(_TABLES.values(), key=lambda each: len(found & set(each.columns)))
    absent = [name for name in table.columns if name not in found]
    if absent:
        wanted = "; ".join(f"{name}: {', '.join(each.columns)}" for name, each in _TABLES.items())
        raise TraceError(f"line 1: no column {absent[0]}; a trace has JSON lines, or {wanted}")
    return table


def _count(row: Row, name: str) -> int:
    """A number of tokens. Raises ValueError."""
    if not row[name].strip().isdecimal():
        raise ValueError(f"{name}: {row[name]!r} is no whole number")
    return int(row[name])


def _seconds(row: Row, name: str) -> float:
    """A time. Raises ValueError."""
    try:
        value = float(row[name])
    except ValueError:
        value = inf
    if not isfinite(value):
        raise ValueError(f"{name}: {row[name]!r} is no number of seconds")
    return value


def _utc(at: datetime) -> datetime:
    """The time, in UTC if it has no zone. In a local zone, some hours occur twice or never."""
    return at if at.tzinfo else at.replace(tzinfo=UTC)
