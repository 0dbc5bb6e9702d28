"""Every answer that a grammar of a type allows can be read as the type."""

import datetime
import enum
import re
import uuid
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import pydantic
import pytest
from grammar_walks import RandomModel, json_compiler, json_tokenizer

from sagellm.client.answer_formats import reader_of
from sagellm.client.exact_schemas import exact_schema_of
from sagellm.runtime.sampling import Grammar

Meta = msgspec.Meta


class Colour(enum.Enum):
    RED = "r+d"
    BLUE = "blue"


class Pair(NamedTuple):
    day: datetime.date
    at: datetime.time


class Row(msgspec.Struct, array_like=True, tag=True):
    number: int
    at: datetime.datetime


class Event(msgspec.Struct, tag=True):
    at: datetime.datetime
    until: Annotated[datetime.datetime, Meta(tz=False)] | None
    rows: list[Row | None]


class Other(msgspec.Struct, tag=True):
    took: datetime.timedelta
    events: list[Event]


class Branch(msgspec.Struct):
    """Its fields have the names of keywords, and it is in its own definition."""

    default: dict[int, "Branch"]
    format: datetime.date
    properties: list[bytes]


class Times(pydantic.BaseModel):
    at: datetime.datetime
    local: pydantic.NaiveDatetime
    day: datetime.date
    clock: datetime.time
    took: datetime.timedelta
    price: Annotated[Decimal, pydantic.Field(ge=0, le=9)]
    data: bytes
    key: uuid.UUID
    days: dict[datetime.date, uuid.UUID]
    named: dict[Annotated[str, pydantic.StringConstraints(pattern="^[a-c]{1,3}$")], bool]


KINDS: list[Any] = [
    datetime.datetime,
    Annotated[datetime.datetime, Meta(tz=True)],
    Annotated[datetime.time, Meta(tz=False)],
    datetime.time,
    datetime.date,
    datetime.timedelta,
    uuid.UUID,
    bytes,
    Annotated[bytes, Meta(min_length=4, max_length=8)],
    Pair,
    Event | Other | None | bytes,
    dict[int, datetime.datetime],
    dict[datetime.date, list[bool]] | None,
    dict[Literal["a b", "c|d"], int],
    dict[Colour, bytes],
    dict[Annotated[str, Meta(pattern="^[a-c]+$")], int],
    tuple[datetime.date, bytes],
    Branch,
    Times,
    list[pydantic.AwareDatetime | Times],
]


def grammar_of(kind: Any) -> Grammar:
    text = msgspec.json.encode(exact_schema_of(kind)).decode()
    return Grammar(kind="json_schema", text=text)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_finished_answer_can_be_read(kind: Any) -> None:
    model, grammar = RandomModel(json_tokenizer(), np.random.default_rng(0)), grammar_of(kind)
    finished = 0
    for _ in range(6):
        output, is_finished = model.answer(
            json_compiler().compile(grammar, "", ignores_eos=False), 300
        )
        if is_finished:
            finished += 1
            reader_of(kind)(json_tokenizer().decode(output))
    assert finished >= 1


def exact_pattern(kind: Any) -> str:
    """The pattern of a type of texts."""
    return str(exact_schema_of(kind)["pattern"])


def test_each_day_is_a_date_and_no_other() -> None:
    is_date = re.compile(exact_pattern(datetime.date)).search
    days = (datetime.date(1999, 12, 31) + datetime.timedelta(each) for each in range(1500))
    assert all(is_date(day.isoformat()) for day in days)
    none = ["0000-01-01", "1900-02-29", "2023-02-29", "2024-02-30", "2024-04-31", "2024-13-01"]
    assert [text for text in none if is_date(text)] == []


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        (datetime.datetime, ["2024-02-29T23:59:59.5", "2024-01-01T00:00:00Z"], ["2024-01-01"]),
        (
            Annotated[datetime.datetime, Meta(tz=True)],
            ["2024-01-01T00:00:00+01:00"],
            ["2024-01-01T00:00:00"],
        ),
        (Annotated[datetime.time, Meta(tz=False)], ["10:00:00"], ["10:00:00Z", "10:00:60"]),
        (datetime.timedelta, ["P1D", "PT1H2M3.5S", "P2DT3M"], ["P", "PT", "P1DT", "P1M", "P1W"]),
        (bytes, ["", "AA==", "AAAA"], ["AAA", "A-_A"]),
        (
            Annotated[bytes, Meta(min_length=2, max_length=4)],
            ["AAA=", "AAAA", "AAAAAA=="],
            ["AA==", "AAAAAAA="],
        ),
    ],
)
def test_a_pattern_takes_what_the_type_reads(
    kind: Any, taken: list[str], refused: list[str]
) -> None:
    is_text = re.compile(exact_pattern(kind)).search
    assert [text for text in taken if not is_text(text)] == []
    assert [text for text in refused if is_text(text)] == []
    for text in taken:
        reader_of(kind)(f'"{text}"')


def test_a_pattern_of_the_type_itself_stays() -> None:
    extra = {"pattern": "^2026-"}
    assert exact_pattern(Annotated[datetime.date, Meta(extra_json_schema=extra)]) == "^2026-"


def test_a_pattern_of_keys_is_searched_in_them() -> None:
    schema = exact_schema_of(dict[Annotated[str, Meta(pattern="b")], int])
    assert schema["patternProperties"] == {"b": {"type": "integer"}}
    assert schema["additionalProperties"] is False
    assert "propertyNames" not in schema


def test_a_text_stays_any_text() -> None:
    assert exact_schema_of(str) == {"type": "string"}
    assert exact_schema_of(dict[str, int])["additionalProperties"] == {"type": "integer"}
