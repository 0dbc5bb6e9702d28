"""The format of Llama 3.1, 3.2, 3.3 and 4: JSON objects that are the whole answer.

    {"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}

A special token may come before an object. Calls in Python syntax, which Llama 3.2 and 4 write now
and then, are read, too (see `pythonic`).

Source: the chat template of meta-llama/Llama-3.1-8B-Instruct.
"""

from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.chat_format import SpecialTokens, ToolUse
from sagellm.chat_formats.json_call import read_call
from sagellm.chat_formats.lark_rules import json_call, one_of
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.pythonic import END_TOKEN, TOKENS, read_python_calls
from sagellm.chat_formats.text_source import TextReading, TextSource

SEPARATOR = ";"


def read_llama_block(source: TextSource, writer: PartWriter, opening: str) -> TextReading[bool]:
    if opening in TOKENS:
        yield from source.space()
    if opening == "[" or (opening in TOKENS and (yield from source.accept("["))):
        return (yield from read_python_calls(source, writer))
    if not (yield from read_call(source, writer, is_open=opening == "{")):
        return False
    yield from source.space()
    yield from source.accept(SEPARATOR)
    return True


def _rules(use: ToolUse, special_tokens: SpecialTokens) -> str:
    more = f' ("{SEPARATOR} " call)*' if use.parallel else ""
    call = one_of(use, lambda tool: json_call(tool, "parameters"))
    return f"block: call{more}\n{call}"


LLAMA3 = BlockFormat(
    name="llama3",
    signs=('{"name": function name, "parameters": ',),  # the template asks the model for this
    other_openings=TOKENS,
    first="{[",
    inner=(END_TOKEN,),
    read_block=read_llama_block,
    block_rules=_rules,
)
