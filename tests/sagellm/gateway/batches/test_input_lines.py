"""The input of a batch: each mistake has its line, and hostile lines cost no more than others."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from batch_calls import as_file, completion_line

from sagellm.gateway.batches.input_lines import MAX_ERRORS, InputScan, read_input, scan_input

ENDPOINT = "/v1/completions"
GOOD = completion_line(0)


def scanned(tmp_path: Path, content: bytes, **options: Any) -> InputScan:
    path = tmp_path / "input"
    path.write_bytes(content)
    known: dict[str, Any] = {"max_lines": 1000, "max_body_bytes": 1000, **options}
    return scan_input(path, ENDPOINT, **known)


def test_each_line_is_found_by_its_place(tmp_path: Path) -> None:
    lines = [completion_line(number, max_tokens=number + 1) for number in range(3)]
    content = b"\n" + as_file(lines[:2]) + b"  \r\n" + as_file(lines[2:])[:-1]  # no last line end
    scan = scanned(tmp_path, content)
    assert (scan.total, scan.errors) == (3, [])
    found = [read_input(tmp_path / "input", offset) for offset in scan.pending]
    assert [one.custom_id for one in found] == ["c-0", "c-1", "c-2"]
    assert [json.loads(one.body) for one in found] == [line["body"] for line in lines]


def test_lines_with_a_result_are_not_pending(tmp_path: Path) -> None:
    lines = [completion_line(number) for number in range(3)]
    scan = scanned(tmp_path, as_file(lines), done={"c-1", "c-9"})
    assert scan.total == 3
    names = [read_input(tmp_path / "input", offset).custom_id for offset in scan.pending]
    assert names == ["c-0", "c-2"]


def body(**fields: Any) -> dict[str, Any]:
    return {**GOOD, "body": {**GOOD["body"], **fields}}


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (b'"\xff"', "invalid_json_line", None),
        (b'{"custom_id": "\xff"}', "invalid_custom_id", "custom_id"),
        (b"\x00", "invalid_json_line", None),
        (b"[" * 5000, "invalid_json_line", None),
        ({**GOOD, "custom_id": 1}, "invalid_custom_id", "custom_id"),
        ({**GOOD, "custom_id": ""}, "invalid_custom_id", "custom_id"),
        ({**GOOD, "custom_id": "x" * 513}, "invalid_custom_id", "custom_id"),
        ({**GOOD, "method": "GET"}, "invalid_method", "method"),
        ({**GOOD, "url": "/v1/chat/completions"}, "invalid_url", "url"),
        ({**GOOD, "url": None}, "invalid_url", "url"),
        ({**GOOD, "urll": "x"}, "unknown_parameter", None),
        ({**GOOD, "body": None}, "invalid_body", "body"),
        ({**GOOD, "body": []}, "invalid_body", "body"),
        (body(prompt="x" * 1000), "body_too_large", "body"),
        (b"x" * 10_000, "line_too_long", None),
        (body(stream=True), "invalid_body", "body.stream"),
        (body(priority=0), "invalid_body", "body.priority"),
        (body(slo_ttft_s=1), "invalid_body", "body.slo_ttft_s"),
        (body(no_queue=True), "invalid_body", "body.no_queue"),
        (GOOD, "duplicate_custom_id", None),
    ],
)
def test_a_wrong_line_is_told_by_its_number(
    tmp_path: Path, line: Any, code: str, param: str | None
) -> None:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    content = as_file([GOOD]) + b"\n" + raw + b"\n" + as_file([completion_line(2)])
    [error] = scanned(tmp_path, content).errors
    assert (error.line, error.code, error.param) == (3, code, param)


def test_a_mistake_shows_nothing_of_the_line_and_the_nearest_name(tmp_path: Path) -> None:
    lines = [{**GOOD, "costum_id": "secret"}, {"secret secret": 1}, {**GOOD, "url": "secret"}]
    errors = scanned(tmp_path, as_file(lines)).errors
    assert "did you mean `custom_id`" in errors[0].message
    assert len(errors) == 3
    assert not any("secret" in error.message for error in errors)


@pytest.mark.parametrize("fields", [{"stream": False}, {"stream": None}, {"priority": 4}])
def test_what_a_batch_does_anyway_may_be_said(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert scanned(tmp_path, as_file([body(**fields)])).errors == []


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_a_file_without_requests_is_wrong(tmp_path: Path, content: bytes) -> None:
    assert [error.code for error in scanned(tmp_path, content).errors] == ["empty_file"]


def test_the_scan_ends_at_one_line_too_many(tmp_path: Path) -> None:
    lines = [completion_line(number) for number in range(20)]
    [error] = scanned(tmp_path, as_file(lines), max_lines=10).errors
    assert (error.code, error.line) == ("too_many_requests", 11)
    assert scanned(tmp_path, as_file(lines) + b"\n \n", max_lines=20).errors == []


def test_blank_lines_are_bounded_too(tmp_path: Path) -> None:
    content = b"\n" * 1_000_000 + as_file([GOOD])
    [error] = scanned(tmp_path, content, max_lines=10).errors
    assert (error.code, error.line) == ("too_many_requests", 41)
    assert scanned(tmp_path, b"\n" * 39 + as_file([GOOD]), max_lines=10).errors == []


MANY = 1_500_000


@pytest.mark.parametrize(
    "line",
    [
        b'{"custom_id": [' + b"[]," * MANY + b"[]]}",
        b'{"url": [' + b"[]," * MANY + b"[]]}",
        b"{" + b'"a":1,' * MANY + b'"b":1}',
        as_file([GOOD])[:-3] + b',"stream":[' + b"[]," * MANY + b"[]]}}",
    ],
    ids=["custom_id", "url", "fields", "stream"],
)
def test_a_line_of_many_values_holds_nothing_up(tmp_path: Path, line: bytes) -> None:
    began_s = time.thread_time()
    [error] = scanned(tmp_path, line, max_body_bytes=8 << 20).errors
    assert time.thread_time() - began_s < 0.5  # built as objects, it takes longer
    assert error.line == 1


def test_a_million_wrong_lines_are_not_all_told(tmp_path: Path) -> None:
    errors = scanned(tmp_path, b"{\n" * 1_000_000).errors
    assert [error.line for error in errors] == list(range(1, MAX_ERRORS + 1))


def test_a_line_that_is_too_long_does_not_hide_the_next(tmp_path: Path) -> None:
    content = b"x" * (5 << 20) + b"\n" + as_file([GOOD]) + b"{\n"
    errors = scanned(tmp_path, content).errors
    assert [(error.line, error.code) for error in errors] == [
        (1, "line_too_long"),
        (3, "invalid_json_line"),
    ]
