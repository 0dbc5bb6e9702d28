import ast
import importlib
from pathlib import Path
from typing import Any, get_args, get_origin, get_overloads, get_type_hints

import pytest

import sagellm
from sagellm.client.replies import TextReply
from sagellm.client.reply_streams import AsyncReplyStream, ReplyStream
from sagellm.client.tool_loop import ToolRun

STUB = Path(sagellm.__file__).with_suffix(".pyi")


def test_type_checkers_know_the_same_names() -> None:
    """The names load at first use, which checkers cannot follow: they read the stub."""
    found = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)]
    names = {alias.name: str(node.module) for node in found for alias in node.names}
    assert names.keys() | {"__version__"} == set(dir(sagellm))
    for name, module in names.items():
        if name != "ops":
            assert getattr(importlib.import_module(module), name) is getattr(sagellm, name), name


@pytest.mark.parametrize("method", ["chat", "generate", "run_tools"])
@pytest.mark.parametrize(
    ("kind", "stream"),
    [
        (sagellm.UnifiedInferenceClient, ReplyStream),
        (sagellm.AsyncUnifiedInferenceClient, AsyncReplyStream),
    ],
)
def test_type_checkers_know_the_type_of_an_answer(kind: Any, stream: Any, method: str) -> None:
    hints = [get_type_hints(each) for each in get_overloads(getattr(kind, method))]
    typed = [each["return"] for each in hints if get_origin(each["response_format"]) is type]
    (parameter,) = {argument for each in typed for argument in get_args(each)}
    wanted = {ToolRun} if method == "run_tools" else {TextReply, stream}
    assert {get_origin(each) for each in typed} == wanted
    assert type(parameter).__name__ == "TypeVar"
