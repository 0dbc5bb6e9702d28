import os

import pytest

from sagellm.runtime.cluster.executor_options import ProcessesOptions


def test_the_defaults_hold_no_mistake() -> None:
    assert list(ProcessesOptions().mistakes()) == []


def test_worker_processes_are_refused_where_linux_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    (mistake,) = ProcessesOptions().mistakes()
    assert mistake.option == "kind"
    assert "executor tasks" in mistake.hint
