"""Helper processes start early, are reused, replaced when killed, and end with their owner."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from hostile_folders import HEALTHY, MESSAGES, TEMPLATES
from logged import logged

from sagellm.runtime.models import (
    HelperUnavailable,
    LimitExceeded,
    TextError,
    helper_main,
    sandbox,
)
from sagellm.runtime.models.helper_process import (
    EncodeWork,
    FrameDecoder,
    HelperSetup,
    TemplateJob,
    WorkRequest,
    encode_frame,
)
from sagellm.runtime.models.isolated import RENDERER, IsolatedTemplate
from sagellm.runtime.models.sandbox import Sandbox

SPINS = TEMPLATES["loops"]
MAYBE = "{% if messages[0].content == 'spin' %}" + SPINS + "{% endif %}" + HEALTHY


@pytest.fixture
def template() -> Iterator[IsolatedTemplate]:
    """A template that spins for a certain message."""
    found = IsolatedTemplate("m", MAYBE, {})
    with found.sandbox.kept():
        yield found


def spin(template: IsolatedTemplate) -> None:
    with pytest.raises(LimitExceeded):
        template.render([{"role": "user", "content": "spin"}])


def test_a_helper_is_started_before_it_is_asked_and_used_again(template: IsolatedTemplate) -> None:
    (pid,) = template.sandbox.pids
    for _ in range(3):
        assert template.render(MESSAGES) == "[user] hey"
    assert template.sandbox.pids == (pid,)


def test_a_helper_that_is_killed_is_replaced_at_once(template: IsolatedTemplate) -> None:
    (pid,) = template.sandbox.pids
    spin(template)
    (other,) = template.sandbox.pids
    assert other != pid
    assert not psutil.pid_exists(pid)
    assert template.render(MESSAGES) == "[user] hey"


def test_the_log_names_the_folder_once_a_minute(template: IsolatedTemplate) -> None:
    with logged() as lines:
        spin(template)
        spin(template)
    (line,) = [line for line in lines if line["event"] == "model_helper_killed"]
    assert (line["model"], line["log_level"]) == ("m", "warning")
    assert line["cause"] == "the model's chat template took more than 0.25 s of CPU time"


def test_a_helper_that_died_while_it_was_idle_is_not_noticed(template: IsolatedTemplate) -> None:
    template.render(MESSAGES)
    (pid,) = template.sandbox.pids
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)], timeout=5)
    assert template.render(MESSAGES) == "[user] hey"


def test_helpers_end_with_their_owner() -> None:
    found = IsolatedTemplate("m", HEALTHY, {})
    with found.sandbox.kept():
        (pid,) = found.sandbox.pids
    assert not psutil.pid_exists(pid)
    assert found.render(MESSAGES) == "[user] hey"  # started again when it is needed
    (pid,) = found.sandbox.pids
    del found
    assert not psutil.pid_exists(pid)


PARENT = """
import sys
from sagellm.runtime.models.isolated import RENDERER, IsolatedTemplate
found = IsolatedTemplate("m", sys.argv[1], {})
with found.sandbox.kept():
    found.sandbox.ready()
    print(*found.sandbox.pids, flush=True)
    sys.stdin.read()
"""


def test_a_helper_does_not_outlive_a_parent_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, HEALTHY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        helper = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([helper], timeout=5)
    assert not alive


def test_a_helper_runs_no_file_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder may be that of a model: `sagellm serve .`"""
    for name in ("json", "jinja2", "msgspec", "sagellm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    found = IsolatedTemplate("m", HEALTHY, {})
    with found.sandbox.kept():
        assert found.render(MESSAGES) == "[user] hey"


def test_a_helper_has_no_other_threads_and_may_write_no_file(template: IsolatedTemplate) -> None:
    template.render(MESSAGES)
    helper = psutil.Process(template.sandbox.pids[0])
    assert helper.num_threads() == 1
    assert helper.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert helper.rlimit(psutil.RLIMIT_AS)[0] < 2 << 30
    assert os.getsid(helper.pid) != os.getsid(0)  # Ctrl-C is for the parent


@pytest.mark.parametrize("backend", ["trio", "asyncio"])
def test_calls_at_once_have_a_helper_each(template: IsolatedTemplate, backend: str) -> None:
    found: list[Any] = []

    async def render(content: str) -> None:
        try:
            found.append(await template.render_async([{"role": "user", "content": content}]))
        except TextError as error:
            found.append(type(error))

    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(render, "spin")
            tasks.start_soon(render, "a")

    anyio.run(run, backend=backend)
    assert found == ["[user] a", LimitExceeded]  # the second did not wait for the first


def test_who_is_cancelled_leaves_a_helper_that_is_fit_for_use(template: IsolatedTemplate) -> None:
    async def run() -> None:
        with anyio.move_on_after(0):
            await template.render_async([{"role": "user", "content": "a"}])

    for _ in range(3):
        anyio.run(run)
    assert template.render(MESSAGES) == "[user] hey"


def test_a_helper_that_is_stopped_is_given_up(
    template: IsolatedTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    template.render(MESSAGES)
    monkeypatch.setattr(sandbox, "ANSWER_S", 0.05)
    for ask in (template.render, lambda messages: anyio.run(template.render_async, messages)):
        (pid,) = template.sandbox.pids or (0,)
        if pid:
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(HelperUnavailable, match=r"no answer within 0\.05 s"):
            ask(MESSAGES)
        assert not psutil.pid_exists(pid) or not pid
    monkeypatch.setattr(sandbox, "ANSWER_S", 30)
    assert template.render(MESSAGES) == "[user] hey"


def test_a_job_that_cannot_be_set_up_is_tried_once() -> None:
    found = IsolatedTemplate("m", HEALTHY, {})
    found.sandbox = Sandbox(
        RENDERER,
        HelperSetup(TemplateJob("{% for x in y %}{% endfor %}" * 4000, {}), 256 << 20, 0.01),
        what="chat template",
        model="m",
    )
    with found.sandbox.kept():
        for _ in range(2):
            with pytest.raises(LimitExceeded, match=r"more than 0\.01 s"):
                found.render(MESSAGES)
            assert found.sandbox.pids == ()
    assert found.variables == frozenset()


def test_a_job_that_could_not_be_set_up_is_tried_again_later(
    template: IsolatedTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    template.sandbox._broken = LimitExceeded("chat template", "was slow")
    template.sandbox._broken_s = sandbox.time.monotonic()
    with pytest.raises(LimitExceeded, match="was slow"):
        template.render(MESSAGES)
    monkeypatch.setattr(sandbox, "_RETRY_S", 0)
    assert template.render(MESSAGES) == "[user] hey"


def test_a_helper_that_fails_by_itself_is_no_fault_of_the_text(
    capfd: pytest.CaptureFixture[str],
) -> None:
    broken = Sandbox(
        "no.such.module", HelperSetup(TemplateJob("", {}), 1, 1.0), what="w", model="m"
    )
    with logged() as lines, pytest.raises(HelperUnavailable, match="ended with code 1"):
        broken.ready()
    assert [line["event"] for line in lines] == ["model_helper_failed"]
    assert "no" in capfd.readouterr().err


def test_a_machine_without_processes_left_is_no_fault_of_the_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("too many")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(HelperUnavailable, match="could be started"):
        IsolatedTemplate("m", HEALTHY, {}).render(MESSAGES)


def test_frames_come_whole_however_they_are_cut() -> None:
    ask = WorkRequest(EncodeWork(("a" * 300,)), 1.0, 2, 3)
    data = encode_frame(ask)
    for size in (1, 3, len(data)):
        frames: FrameDecoder[WorkRequest] = FrameDecoder(WorkRequest)
        found = [frames.feed(data[at : at + size]) for at in range(0, len(data), size)]
        assert found == [None] * (len(found) - 1) + [ask]


def test_a_helper_ends_when_nobody_is_at_the_other_end(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", helper_main.__name__, RENDERER]
    with subprocess.Popen(command, stdin=theirs.fileno()) as helper:
        theirs.close()
        ours.close()
        assert helper.wait(10) == 0
