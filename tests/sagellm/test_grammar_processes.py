"""Answers with grammars over processes: a killed worker changes no token of them."""

import json
import re
from functools import partial

import pytest
from process_streams import Streams, killed, opened, stream_all

from sagellm import Sampling
from sagellm.runtime.sampling import Grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "words": {
            "type": "array",
            "items": {"type": "string", "minLength": 3, "maxLength": 8},
            "minItems": 10,
            "maxItems": 12,
        },
        "fox": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
    },
    "required": ["words", "fox"],
    "additionalProperties": False,
}
REGEX = "([a-z]{2,7} ){14}(end|END)"
GRAMMARS = {
    "json": Grammar(kind="json_schema", text=json.dumps(SCHEMA)),
    "regex": Grammar(kind="regex", text=REGEX),
}
HOW = {"greedy": {}, "seeded": {"temperature": 0.6, "seed": 5}}


def texts_of(streams: Streams) -> dict[int, str]:
    """sage-tiny's tokens are bytes."""
    return {
        number: bytes(token for token in token_ids if token < 256).decode(errors="replace")
        for number, token_ids in streams.tokens.items()
    }


@pytest.mark.parametrize(
    ("how", "grammar"),
    [
        ("greedy", "json"),
        ("seeded", "regex"),
        pytest.param("greedy", "regex", marks=pytest.mark.soak),
        pytest.param("seeded", "json", marks=pytest.mark.soak),
    ],
)
async def test_a_killed_worker_changes_no_token(how: str, grammar: str) -> None:
    sampling = Sampling(max_tokens=300, grammar=GRAMMARS[grammar], **HOW[how])
    async with opened("pd_many", "tasks") as session:
        right = await stream_all(session, sampling)
    async with opened("pd_many") as session:
        kill = partial(killed, session, "d[0]", of=max, after=40)
        found = await stream_all(session, sampling, kill)
        num_migrated = session.executor.core.recovery.num_migrated
    assert num_migrated > 0
    assert found.tokens == right.tokens
    assert found.reasons == right.reasons
    assert "stop" in found.reasons.values()
    for number, text in texts_of(found).items():
        assert found.reasons[number] in ("stop", "length")
        if found.reasons[number] == "stop":
            check(grammar, text)


def check(grammar: str, text: str) -> None:
    if grammar == "regex":
        assert re.fullmatch(REGEX, text)
        return
    answer = json.loads(text)
    assert 10 <= len(answer["words"]) <= 12
    assert all(3 <= len(word) <= 8 for word in answer["words"])
    assert answer["fox"] in (None, *range(10))
