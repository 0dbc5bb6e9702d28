"""Answers of Mistral: calls after `[TOOL_CALLS]`."""

import pytest
from answer_parsing import parsed

from sagellm.chat_formats import (
    FORMATS,
    AnswerPart,
    Content,
    Reasoning,
    ToolCallDelta,
    ToolSpec,
    ToolUse,
)

PARIS = '{"city": "Paris]["}'
FIRST = ToolCallDelta(0, "0", "get_weather", PARIS)
BOTH = [FIRST, ToolCallDelta(1, "1", "time", "{}")]
LIST = f'[{{"name": "get_weather", "arguments": {PARIS}, "id": "abcdefghi"}}'
TWO = '{"name": "time", "arguments": {}}'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"[TOOL_CALLS]{LIST}]", [FIRST]),
        (f"[TOOL_CALLS] {LIST}, {TWO}]\n", BOTH),
        (f"Sure. [TOOL_CALLS]{LIST} ,{TWO} ]", [Content("Sure. "), *BOTH]),
        (f"[TOOL_CALLS]{LIST}", [FIRST]),
        (f"[TOOL_CALLS]{LIST}, {{", [FIRST, Content(", {")]),
        (f"[TOOL_CALLS]{LIST}; {TWO}]", [FIRST, Content(f"; {TWO}]")]),
        (f"[TOOL_CALLS]{LIST}, 1]", [FIRST, Content(", 1]")]),
        (f"[TOOL_CALLS]get_weather[ARGS]{PARIS}", [FIRST]),
        (f"[TOOL_CALLS]get_weather{PARIS}", [FIRST]),
        (f"[TOOL_CALLS]get_weather[CALL_ID]abc[ARGS]{PARIS}[TOOL_CALLS]time[ARGS]{{}}", BOTH),
        (f"[TOOL_CALLS]get_weather[ARGS]{PARIS} Done.", [FIRST, Content(" Done.")]),
        ("[TOOL_CALLS]time[ARGS]{", [ToolCallDelta(0, "0", "time", "{")]),
    ],
)
def test_an_answer(text: str, parts: list[AnswerPart]) -> None:
    assert parsed("mistral", text) == parts
    assert parsed("mistral_list", text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "[TOOL_CALL] [TOOL_CALLS",
        "[TOOL_CALLS]",
        "[TOOL_CALLS][]",
        "[TOOL_CALLS]unknown[ARGS]{}",
        "[TOOL_CALLS]time[ARGS]",
        "[TOOL_CALLS]time[ARGS]no",
        "[TOOL_CALLS]time, perhaps",
        '[TOOL_CALLS][{"name": "unknown"}]',
        "[TOOL_CALLS]tim",
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert parsed("mistral", text) == [Content(text)]


def test_an_id_has_nine_letters_and_digits() -> None:
    parser = FORMATS["mistral"].open_parser(ToolUse(tools=(ToolSpec(name="f"),)), "")
    (call, _) = parser.push("[TOOL_CALLS]f[ARGS]{}")
    assert isinstance(call, ToolCallDelta)
    assert len(call.id) == 9
    assert call.id.isalnum()


def test_reasoning_stands_in_its_own_tags() -> None:
    text = f"[THINK]hm[/THINK][TOOL_CALLS]get_weather[ARGS]{PARIS}"
    assert parsed("magistral", text) == [Reasoning("hm"), FIRST]
    text = text.replace("[THINK]", "<think>").replace("[/THINK]", "</think>")
    assert parsed("magistral_2506", text) == [Reasoning("hm"), FIRST]
