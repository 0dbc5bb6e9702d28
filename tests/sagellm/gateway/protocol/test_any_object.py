"""Any object at all becomes a request or an ApiError, which shows nothing that the client wrote."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.bodies import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChat,
    TokenizePrompt,
    read_chat,
    read_completion,
    read_detokenize,
    read_tokenize,
)
from sagellm.gateway.protocol.chat_messages import (
    ConversationMessage,
    FunctionCall,
    TextPart,
    ToolCall,
    rendering_of,
)
from sagellm.gateway.protocol.other_apis import MESSAGE, PART, REQUEST, TOOL_CALL
from sagellm.gateway.protocol.request import StreamOptions
from sagellm.gateway.protocol.sampling_params import ModelBounds, kept_ids, sampling_of
from sagellm.gateway.settings import RequestLimits
from sagellm.runtime.sampling import sampling_fault

FACTS = ModelBounds(vocab_size=100, max_model_len=64)
MARK = "no-one-reads-this"
TEXT = st.sampled_from(["", MARK, MARK * 9, "text", "user", "left", "none", "system", "\U0001f600"])
NUMBERS = st.integers(-3, 40) | st.floats(-3, 3) | st.sampled_from([2**31, 2**63, -(2**63), 1e300])
INSIDE = st.sampled_from(
    [
        *ConversationMessage.__struct_fields__,
        *TextPart.__struct_fields__,
        *StreamOptions.__struct_fields__,
        *(name for tables in (MESSAGE, PART, TOOL_CALL) for table in tables for name in table),
        *FunctionCall.__struct_fields__,
        *ToolCall.__struct_fields__,
        *("5", "99", MARK + "!"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(INSIDE, inner, max_size=3),
    max_leaves=8,
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), max_size=2)
ARGUMENTS = TEXT | st.sampled_from(['{"a": 1}', "[]", '{"a": "\\u0000"}', "{" * 99])
CALLS = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": TEXT, "arguments": ARGUMENTS})}
)
MESSAGES = st.fixed_dictionaries(
    {"role": TEXT | st.sampled_from(["user", "assistant"]), "content": TEXT | PARTS | st.none()},
    optional={"tool_calls": st.lists(CALLS | VALUES, max_size=2)},
)
IDS = st.lists(st.integers(-1, 120), max_size=3)
PROMPT = TEXT | st.lists(TEXT, max_size=3) | IDS | st.lists(IDS, max_size=2)
# How each is read, what its body cannot do without, and all that may stand beside it.
FORMS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "completion": (read_completion, {"prompt": PROMPT}, CompletionRequest.__struct_fields__),
    "chat": (
        read_chat,
        {"messages": st.lists(MESSAGES | VALUES, max_size=3)},
        ChatRequest.__struct_fields__,
    ),
    "tokenize": (read_tokenize, {"prompt": PROMPT}, TokenizePrompt.__struct_fields__),
    "tokenize chat": (
        read_tokenize,
        {"messages": st.lists(MESSAGES, max_size=3)},
        TokenizeChat.__struct_fields__,
    ),
    "detokenize": (read_detokenize, {"tokens": IDS}, DetokenizeRequest.__struct_fields__),
}


def bodies(needed: dict[str, Any], known: tuple[str, ...]) -> Any:
    """Mostly fields that are known, with any value; now and then one that is not."""
    optional = {name: VALUES for name in known if name not in needed}
    strange = st.dictionaries(
        st.sampled_from([*REQUEST.unbuilt, *REQUEST.taken, MARK + "!", ""]), VALUES, max_size=1
    )
    said = st.fixed_dictionaries(needed, optional=optional)
    return st.builds(lambda said, more: {**more, **said}, said, st.just({}) | strange)


@pytest.mark.parametrize("name", FORMS)
@given(data=st.data())
def test_any_object_is_a_request_or_refused(name: str, data: st.DataObject) -> None:
    read, needed, known = FORMS[name]
    body = data.draw(bodies(needed, known))
    try:
        request = read(json.dumps(body).encode(), RequestLimits())
        if isinstance(request, CompletionRequest | ChatRequest):
            if isinstance(request, ChatRequest):
                rendering_of(request, frozenset({"thinking", MARK}))
            kept_ids(request, (1, 2, 3), FACTS)
            assert sampling_fault(sampling_of(request, FACTS, 3)) is None
    except ApiError as error:
        shown = f"{error.message} {error.param} {error.code}"
        if error.status not in (400, 404) or MARK in shown:
            raise
