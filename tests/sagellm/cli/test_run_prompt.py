import io
import json
import os
import subprocess
import sys

import pytest

from sagellm.cli import main

ASK = ("run", "pd", "--chat", "--prompt", "What is 20 + 31?", "--max-tokens", "4")


def test_the_answer_is_all_that_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASK]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("\n")
    assert shown.err.startswith("requests: 1\n")


def test_json_is_the_line_that_a_file_would_get(capsys: pytest.CaptureFixture[str]) -> None:
    main([*ASK, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"id", "text", "token_ids", "finish_reason", "usage", "timing"}
    assert found["usage"]["completion_tokens"] == len(found["token_ids"]) <= 4


def test_a_stream_adds_up_to_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    main([*ASK])
    whole = capsys.readouterr().out
    main([*ASK, "--stream"])
    assert capsys.readouterr().out == whole


def test_a_stream_as_json_is_one_line_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    main([*ASK, "--stream", "--json"])
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(events) > 1
    assert [event["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["finish_reason"] in ("stop", "length")


def test_a_seed_makes_a_sample_repeatable(capsys: pytest.CaptureFixture[str]) -> None:
    sampled = (*ASK, "--temperature", "2", "--seed", "7")
    main(list(sampled))
    first = capsys.readouterr().out
    main([*sampled, "--set", "split.min_uncached_tokens=8"])
    assert capsys.readouterr().out == first


def test_an_answer_is_one_of_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASK[:-2], "--choice", "perhaps", "--choice", "never"]) == 0
    assert capsys.readouterr().out in ("perhaps\n", "never\n")


def test_a_wrong_grammar_is_said_before_a_model_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "pd", "--model", "nowhere", "--prompt", "a", "--regex", "("]) == 2
    assert "where: --regex" in capsys.readouterr().err


def test_a_dash_reads_the_prompt_from_stdin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What is 20 + 31?")))
    main(["run", "pd", "--chat", "--prompt", "-", "--max-tokens", "4"])
    piped = capsys.readouterr().out
    main(list(ASK))
    assert capsys.readouterr().out == piped


@pytest.mark.parametrize(
    ("argv", "cause"),
    [
        (["run", "pdd", "--prompt", "x"], "did you mean pd?"),
        (["run", "pd", "--prompt", ""], "the prompt is empty"),
        (["run", "pd", "--prompt", "x", "--model", "frob"], "'frob' is not built in"),
        (["run", "pd", "--prompt", "x", "--set", "p.device=cuba"], "device: 'cuba' is not built"),
        (["run", "pd", "--prompt", "x", "--set", "splt.a=1"], "did you mean split?"),
        (["run", "pd", "--prompt", "x", "--set", "sort.policy=slo"], "slo_aware"),
        (["run", "pd", "--prompt", "x" * 5000], "5000"),
    ],
)
def test_a_users_mistake_is_two_and_no_traceback(
    argv: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert cause in shown.err
    assert "fix:" in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("how", [(), ("--stream",), ("--json",)])
def test_an_answer_beyond_the_context_is_refused_as_the_server_does(
    how: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "joint", "--prompt", "abc", "--max-tokens", "5000", *how]) == 2
    said = capsys.readouterr().err
    assert "the prompt has 3 tokens and max_tokens is 5000; the context limit is 2048" in said
    assert "give max_tokens 2045 or less" in said


def test_stdin_that_is_no_text_is_a_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert main(["run", "pd", "--prompt", "-"]) == 2
    assert "where: stdin" in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_a_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "pd", "--prompt", "\udcff"]) == 2
    assert "the prompt is not UTF-8" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "sagellm", *ASK, "--stream"]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, b"")
