from pathlib import Path

import pytest

from sagellm.batch import encode_record, error_record, open_output

ANSWER = {"id": "a", "text": "ok"}
OTHER = {"id": 2, "text": "so"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def test_each_line_is_in_the_file_before_the_next(path: Path) -> None:
    with open_output(path) as output:
        output.write(ANSWER)
        assert path.read_bytes() == encode_record(ANSWER)


def test_an_existing_file_is_not_touched(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        open_output(path)
    assert path.read_text() == "precious"


def test_force_overwrites(path: Path) -> None:
    path.write_text("old")
    with open_output(path, force=True) as output:
        output.write(ANSWER)
    assert path.read_bytes() == encode_record(ANSWER)


def test_resume_keeps_answers_and_appends(path: Path) -> None:
    path.write_bytes(encode_record(ANSWER) + encode_record(OTHER))
    with open_output(path, resume=True) as output:
        assert output.answered == {"a", "2"}
        output.write({"id": "c", "text": ""})
    assert path.read_bytes() == encode_record(ANSWER) + encode_record(OTHER) + encode_record(
        {"id": "c", "text": ""}
    )


@pytest.mark.parametrize(
    "rest",
    [
        b'{"id":"b","te',
        b'{"id":"b","text":"x"}',
        b"\x00\x00",
        encode_record(error_record("b", "no", "failed")),
    ],
    ids=["torn", "without newline", "zeros", "error"],
)
def test_resume_drops_what_is_no_whole_answer(path: Path, rest: bytes) -> None:
    path.write_bytes(encode_record(ANSWER) + rest)
    with open_output(path, resume=True) as output:
        assert output.answered == {"a"}
    assert path.read_bytes() == encode_record(ANSWER)


def test_resume_without_a_file_begins_one(path: Path) -> None:
    with open_output(path, resume=True) as output:
        assert output.answered == frozenset()
        output.write(ANSWER)
    assert path.read_bytes() == encode_record(ANSWER)


def test_resuming_leaves_no_other_file(path: Path) -> None:
    path.write_bytes(encode_record(ANSWER))
    open_output(path, resume=True).__exit__(None, None, None)
    assert list(path.parent.iterdir()) == [path]
