"""Hostile grammars are refused soon, or compiled and followed within limits."""

import contextlib
import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from grammar_walks import RandomModel, json_compiler, json_tokenizer
from hostile_grammars import ACCEPTED, CHAINS, REFUSED, lark, regex, schema

from sagellm.backends.step import MatcherError
from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.sampling import Grammar

# CPU time of the thread, so that other processes do not count; several times what was measured.
REFUSED_S, COMPILED_S, MASK_S = 0.4, 0.5, 0.5
SECRET = "Rumpelstiltskin"


@contextlib.contextmanager
def within(cpu_s: float) -> Iterator[None]:
    gc.disable()  # the objects of all other tests, which a collection visits, cost nothing here
    try:
        begin_s = time.thread_time()
        yield
        taken_s = time.thread_time() - begin_s
    finally:
        gc.enable()
    assert taken_s < cpu_s


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_reason(name: str) -> None:
    grammar, expected = REFUSED[name]
    with within(REFUSED_S), pytest.raises(GrammarError) as refused:
        check_grammar(grammar)
    assert expected in str(refused.value)
    with pytest.raises(GrammarError):
        json_compiler().compile(grammar, "", ignores_eos=False)


@pytest.mark.parametrize("name", ACCEPTED)
def test_it_is_followed_within_limits(name: str) -> None:
    with within(COMPILED_S):
        check_grammar(ACCEPTED[name])
        matcher = json_compiler().compile(ACCEPTED[name], "", ignores_eos=False)
    model, output = RandomModel(json_tokenizer(), np.random.default_rng(0)), list[int]()
    begin_s = time.thread_time()
    with contextlib.suppress(MatcherError):  # some reach a limit
        for token in model.tokens(matcher, output):
            assert time.thread_time() - begin_s < MASK_S
            output.append(token)
            if len(output) > 60:
                break
            begin_s = time.thread_time()


def test_memory_is_bounded() -> None:
    before = psutil.Process().memory_info().rss
    for grammar in ACCEPTED.values():
        check_grammar(grammar)
    assert psutil.Process().memory_info().rss - before < 256 << 20


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        for keywords in ({"$ref": address}, {"$schema": address}, {"$id": address, "$ref": "a"}):
            with contextlib.suppress(GrammarError):
                check_grammar(schema(keywords))
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    "grammar",
    [
        schema({"type": SECRET}),
        schema({"$ref": f"#/$defs/{SECRET}"}),
        schema({"$ref": f"http://{SECRET}/"}),
        schema({"type": "string", "minLength": SECRET}),
        schema({"type": "object", "required": [SECRET], "additionalProperties": False}),
        schema({"type": "string", "pattern": f"({SECRET}"}),
        schema({"not": {"const": SECRET}}),
        schema(SECRET),
        regex(f"(?={SECRET})"),
        regex(f"{SECRET}("),
        lark(f"start: {SECRET}"),
        lark(f'start: "{SECRET}'),
        lark(f'start: "a"\n{SECRET.lower()}: "{SECRET}'),
        lark(f'start: "a" "{SECRET}"]'),
        lark(f"start: @{SECRET}"),
        lark(f"start: %json {SECRET}"),
        lark(f'root ::= "{SECRET}'),
        lark(f"root ::= {SECRET}"),
    ],
)
def test_a_reason_has_no_text_of_the_grammar(grammar: Grammar) -> None:
    with pytest.raises(GrammarError) as refused:
        check_grammar(grammar)
    assert SECRET.lower() not in str(refused.value).lower()
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_definitions_is_refused_before_it_overflows_a_stack(name: str) -> None:
    with within(REFUSED_S), pytest.raises(GrammarError, match=r"through .*\d00|overlap"):
        check_grammar(CHAINS[name])


def test_the_longest_chains_fit_the_smallest_stack() -> None:
    """In a process of their own, which a stack that overflows ends."""
    work = (
        "import threading; from hostile_grammars import LONGEST;"
        "from sagellm.runtime.grammars.grammar_compiler import check_grammar;"
        "threading.stack_size(2 << 20);"
        "threads = [threading.Thread(target=check_grammar, args=[one]) for one in LONGEST];"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", work], env=environment, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")
