from pathlib import Path

import pytest

from sagellm.batch import error_record
from sagellm.cli.terminal import FileProgress


def test_without_a_terminal_only_failures_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in"
    path.write_text("{}\n{}\n")
    with FileProgress(path) as progress:
        progress.advance({"id": 1, "text": ""})
        progress.advance(error_record("[b]", "line 2: no", "malformed"))
        progress.advance(None)
    assert capsys.readouterr().err == "[b]: line 2: no\n"


def test_on_a_terminal_there_is_a_bar_with_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = tmp_path / "in"
    path.write_text("{}\n\n{}")
    with FileProgress(path) as progress:
        progress.advance({"id": 1, "text": ""})
    assert "1/2" in capsys.readouterr().err
