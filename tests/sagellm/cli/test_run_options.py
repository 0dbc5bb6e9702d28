from pathlib import Path

import pytest

from sagellm.cli.errors import Failure
from sagellm.cli.graph_argument import parse_assignments
from sagellm.cli.run_options import (
    FileOptions,
    PromptOptions,
    RunSamplingOptions,
    check_run_options,
)
from sagellm.runtime.sampling import Sampling

IN, OUT = Path("in.jsonl"), Path("out.jsonl")


@pytest.mark.parametrize(
    ("text", "value"),
    [("8", 8), ("0.5", 0.5), ("true", True), ("fifo", "fifo"), ('"8"', "8"), ("null", "null")],
)
def test_a_setting_is_json_or_text(text: str, value: object) -> None:
    assert parse_assignments((f"sort.policy={text}",)) == {"sort.policy": value}


def test_a_value_may_hold_an_equals_sign() -> None:
    assert parse_assignments(("a.b=c=d",)) == {"a.b": "c=d"}


@pytest.mark.parametrize("wrong", ["a.b", "ab=1", ".=1", ""])
def test_a_setting_says_op_key_value(wrong: str) -> None:
    with pytest.raises(Failure, match=r"op\.key=value"):
        parse_assignments((wrong,))


def test_only_what_was_given_is_given() -> None:
    options = RunSamplingOptions(temperature=0.0)
    assert options.given == {"temperature": 0.0}
    assert options.sampling == Sampling(temperature=0.0)


@pytest.mark.parametrize(
    ("asked", "files"),
    [
        (PromptOptions(prompt="hi", chat=True, stream=True), FileOptions()),
        (PromptOptions(), FileOptions(input=IN)),
        (PromptOptions(), FileOptions(input=IN, output=OUT, resume=True)),
        (PromptOptions(), FileOptions(input=IN, output=OUT, force=True)),
    ],
)
def test_options_that_go_together(asked: PromptOptions, files: FileOptions) -> None:
    check_run_options(asked, files)


@pytest.mark.parametrize(
    ("asked", "files", "cause"),
    [
        (PromptOptions(), FileOptions(), "either --prompt or --input"),
        (PromptOptions(prompt="hi"), FileOptions(input=IN), "either --prompt or --input"),
        (PromptOptions(prompt="hi"), FileOptions(output=OUT), "--output does not go with --prompt"),
        (PromptOptions(prompt="hi"), FileOptions(resume=True), "--resume does not go"),
        (PromptOptions(chat=True), FileOptions(input=IN), "--chat does not go with --input"),
        (PromptOptions(stream=True), FileOptions(input=IN), "--stream does not go"),
        (PromptOptions(), FileOptions(input=IN, force=True), "need a file"),
        (PromptOptions(), FileOptions(input=IN, output=OUT, force=True, resume=True), "contradict"),
    ],
)
def test_no_option_is_taken_and_ignored(
    asked: PromptOptions, files: FileOptions, cause: str
) -> None:
    with pytest.raises(Failure) as caught:
        check_run_options(asked, files)
    assert cause in caught.value.cause
