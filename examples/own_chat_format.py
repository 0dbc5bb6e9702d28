"""A chat format of your own: the model writes each call as `@name {"x": 1}` between two bars."""

import re

from sagellm import register_chat_format
from sagellm.chat_formats import Content, ToolSpec, ToolUse, format_of
from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.json_call import read_json
from sagellm.chat_formats.lark_rules import arguments, literal, one_of
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.text_source import TextReading, TextSource


def read_block(source: TextSource, writer: PartWriter, opening: str) -> TextReading[bool]:
    """Read what follows `|@`. A reader yields where the rest of the text has not come yet."""
    name: list[str] = []
    yield from source.before(re.compile(r"\W"), name.append)
    yield from source.space()
    if writer.begin_call("".join(name)) is None:
        return False  # what was read is content
    source.stop_record()
    yield from read_json(source, writer.arguments)
    return (yield from source.accept("|"))


def block_rules(use: ToolUse, special_tokens: object) -> str:
    """The grammar of what follows `|@`, in llguidance's Lark."""
    call = one_of(use, lambda tool: f"{literal(tool.name + ' ')} {arguments(tool)}")
    return f'block: call "|"\n{call}'


BARS = BlockFormat(
    name="bars", signs=("|@",), opening="|@", read_block=read_block, block_rules=block_rules
)
if __name__ == "__main__":
    register_chat_format("bars", BARS)
    parser = format_of("{{ '|@' + name }}").open_parser(ToolUse(tools=(ToolSpec(name="add"),)), "")
    parts = [*parser.push('I add.|@add {"x"'), *parser.push(": 1}|"), *parser.finish()]
    print([part.text if isinstance(part, Content) else part.arguments for part in parts])
