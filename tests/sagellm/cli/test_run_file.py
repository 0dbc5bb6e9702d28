import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sagellm.cli import main

NULL = ("--set", "p.device=null", "--set", "d.device=null")
SLOW = ("--set", "d.decode_step_s=0.02", "--set", "admission.max_queued=1024")


class Files:
    """An input and an output file in one folder."""

    def __init__(self, folder: Path) -> None:
        self.input = folder / "in.jsonl"
        self.output = folder / "out.jsonl"

    def ask(self, *lines: dict[str, Any] | str) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.input.write_text("".join(f"{text}\n" for text in texts))

    def argv(self, *options: str) -> list[str]:
        named = ("--input", str(self.input), "--output", str(self.output))
        return ["run", "pd", *NULL, *named, *options]

    @property
    def answers(self) -> dict[Any, dict[str, Any]]:
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        assert len({line["id"] for line in lines}) == len(lines)
        return {line["id"]: line for line in lines}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def prompt(*token_ids: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": list(token_ids), "max_tokens": 3, **fields}


def test_a_file_of_prompts_becomes_a_file_of_answers(files: Files) -> None:
    files.ask(prompt(1, id="a"), {"custom_id": "b", "body": prompt(1, 2)})
    assert main(files.argv()) == 0
    assert set(files.answers) == {"a", "b"}
    line = files.answers["b"]
    assert line["finish_reason"] == "length"
    assert line["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert line["timing"]["decode_ms"] > 0


def test_each_line_may_bind_its_answer(files: Files) -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {"const": 7}}}
    files.ask(
        {"id": "a", "prompt": "x", "structured_outputs": {"choice": ["perhaps"]}},
        {"custom_id": "b", "body": {"prompt": "x", "response_format": schema}},
        {"id": "c", "prompt": "x"},
        {"id": "d", "prompt": "x", "grammar": {"kind": "regex", "text": "("}},
    )
    named = ("--input", str(files.input), "--output", str(files.output))
    assert main(["run", "joint", *named, "--choice", "never"]) == 1
    texts = [files.answers[id].get("text") for id in "abcd"]
    assert texts == ["perhaps", "7", "never", None]
    assert "grammar is wrong" in files.answers["d"]["error"]["message"]


def test_without_an_output_the_answers_are_on_stdout(
    files: Files, capfd: pytest.CaptureFixture[str]
) -> None:
    files.ask(prompt(1, id="a"), prompt(1, 2, id="b"))
    assert main(["run", "pd", *NULL, "--input", str(files.input)]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert {line["id"] for line in lines} == {"a", "b"}


def test_an_output_in_no_folder_is_refused(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    files.ask(prompt(1))
    files.output = files.output.parent / "missing" / "out.jsonl"
    assert main(files.argv()) == 2
    assert f"there is no folder {files.output.parent}" in capsys.readouterr().err


def test_a_long_prompt_passes_the_transfer(files: Files) -> None:
    files.ask(prompt(*range(40), id="long"), prompt(1, id="short"))
    main(files.argv())
    assert files.answers["long"]["timing"]["transfer_ms"] is not None
    assert files.answers["short"]["timing"]["transfer_ms"] is None


def test_several_choices_come_in_one_line(files: Files) -> None:
    files.ask(prompt(1, n=3))
    assert main(files.argv()) == 0
    assert [choice["index"] for choice in files.answers[1]["choices"]] == [0, 1, 2]
    assert files.answers[1]["usage"]["completion_tokens"] == 9


def test_a_malformed_line_is_reported_and_the_others_answered(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    files.ask(prompt(1), "{", prompt(2))
    assert main(files.argv()) == 1
    assert {id: "error" in line for id, line in files.answers.items()} == {
        1: False,
        2: True,
        3: False,
    }
    assert "line 2" in capsys.readouterr().err


def test_a_line_that_the_session_refuses_is_an_error_of_its_own(files: Files) -> None:
    files.ask(prompt(1, temperature=-1), prompt(2))
    assert main(files.argv()) == 1
    assert "temperature" in files.answers[1]["error"]["message"]
    assert files.answers[2]["finish_reason"] == "length"


def test_a_line_that_asks_for_more_than_the_context_is_an_error_of_its_own(files: Files) -> None:
    files.ask({"id": "long", **prompt(1, max_tokens=10**5)}, {"id": "cut", "prompt": [1] * 2000})
    assert main(files.argv()) == 1
    assert (
        "the prompt has 1 tokens and max_tokens is 100000"
        in files.answers["long"]["error"]["message"]
    )
    assert files.answers["cut"]["finish_reason"] == "length"


def test_options_fill_what_lines_leave_out(files: Files) -> None:
    files.ask({"prompt": [1]}, prompt(2))
    main(files.argv("--max-tokens", "5"))
    assert [len(line["token_ids"]) for _, line in sorted(files.answers.items())] == [5, 3]


def test_an_existing_output_is_kept(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.ask(prompt(1))
    files.output.write_text("precious")
    assert main(files.argv()) == 2
    assert files.output.read_text() == "precious"
    assert "--resume" in capsys.readouterr().err
    assert main(files.argv("--force")) == 0
    assert set(files.answers) == {1}


def test_resume_asks_only_what_has_no_answer(files: Files) -> None:
    files.ask(prompt(1), prompt(2), prompt(3))
    kept = {"id": 2, "text": "kept", "token_ids": []}
    files.output.write_text(json.dumps(kept) + '\n{"id":3,"te')
    assert main(files.argv("--resume")) == 0
    assert set(files.answers) == {1, 2, 3}
    assert files.answers[2] == kept


@pytest.mark.parametrize("option", [(), ("--force",), ("--resume",)])
@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_the_input_is_never_the_output(
    files: Files, option: tuple[str, ...], link: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    files.ask(prompt(1))
    before = files.input.read_text()
    link(files.output, files.input)
    assert main(files.argv(*option)) == 2
    assert "the output is the input" in capsys.readouterr().err
    assert files.input.read_text() == before


@pytest.mark.parametrize("missing", ["absent.jsonl", "."])
def test_an_input_that_cannot_be_read_is_the_users_mistake(
    files: Files, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files.input = files.input.parent / missing
    assert main(files.argv()) == 2
    assert "fix:" in capsys.readouterr().err
    assert not files.output.exists()


def test_the_summary_is_short_and_on_stderr(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    files.ask(prompt(1), prompt(2))
    main(files.argv())
    shown = capsys.readouterr()
    assert shown.out == ""
    labels = [line.split(":")[0] for line in shown.err.splitlines()]
    expected = ["requests", "tokens", "tokens/s", "TTFT p50/p99", "ITL p50/p99", "peak KV use"]
    assert labels == expected


def test_the_summary_as_json_is_on_stdout(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.ask(prompt(1), "{")
    main(files.argv("--json"))
    found = json.loads(capsys.readouterr().out)
    assert (found["answered"], found["failed"], found["tokens"]) == (1, 1, 3)
    assert found["ttft_s"]["p50"] > 0


def whole_lines(path: Path) -> list[str]:
    """The whole lines of a file that may be torn at its end, or not exist yet."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def start(files: Files, *options: str) -> "subprocess.Popen[str]":
    """Start the command in a process; return when its first answer is written."""
    command = [sys.executable, "-m", "sagellm", *files.argv(*SLOW, *options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not whole_lines(files.output):
        time.sleep(0.005)  # a quarter of a step; a file does not notify of its growth
    return process


def test_a_killed_run_is_resumed_without_asking_twice(files: Files) -> None:
    files.ask(*(prompt(1, number, max_tokens=20) for number in range(200)))
    process = start(files)
    process.kill()
    process.communicate()
    before = whole_lines(files.output)
    assert 0 < len(before) < 200
    assert main(files.argv("--resume")) == 0
    assert set(files.answers) == set(range(1, 201))
    assert set(before) <= set(files.output.read_text().splitlines())


def test_the_first_interrupt_finishes_what_runs(files: Files) -> None:
    files.ask(*(prompt(1, number, max_tokens=20) for number in range(400)))
    process = start(files)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ctrl-C again" in errors
    assert 0 < len(files.answers) < 400
    assert all("text" in line for line in files.answers.values())


def test_the_second_interrupt_stops_at_once(files: Files) -> None:
    files.ask(*(prompt(1, number, max_tokens=2000) for number in range(40)), prompt(1))
    process = start(files)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert "Ctrl-C again" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert set(files.answers) == {41}
