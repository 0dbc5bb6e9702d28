"""Every promise in GUARANTEES.md names tests, and each of them is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "GUARANTEES.md").read_text()
PROMISES = {part.split(".")[0]: part for part in TEXT.split("\n**")[1:]}
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def functions_of(file: str) -> frozenset[str]:
    """The functions that pytest finds in a file."""
    path = ROOT / file
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    functions = (
        one for one in tree.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return frozenset(one.name for one in functions if one.name.startswith("test_"))


def test_promises_are_numbered_one_after_the_other() -> None:
    assert list(PROMISES) == [f"G{number}" for number in range(1, len(PROMISES) + 1)]
    assert len(PROMISES) > 20


@pytest.mark.parametrize("number", PROMISES)
def test_a_promise_names_tests_that_are_there(number: str) -> None:
    named = NAMED.findall(PROMISES[number])
    assert named
    assert [f"{file}::{test}" for file, test in named if test not in functions_of(file)] == []


def test_no_mention_of_a_test_is_overlooked() -> None:
    assert len(NAMED.findall(TEXT)) == TEXT.count("::test_")
