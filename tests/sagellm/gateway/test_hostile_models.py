"""Whatever a model's folder does, others are served, and its own callers are told the cause."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from gateway_calls import playing
from gateway_calls import post as call
from gateway_served import SERVERS, Served, get, post, serving
from hostile_folders import HEALTHY, MESSAGES, TEMPLATES, TOKENIZERS, hostile_folder, load

from sagellm.gateway.encoding import PromptEncoder
from sagellm.gateway.http.endpoints import chat, completions, tokenize
from sagellm.runtime.models import HelperUnavailable
from sagellm.runtime.models.tokenizer import Tokenizer

CANARY_S = 0.05
NUM_CALLS = 4
WARM_S = 100e-6
SLOWEST = {"loops": ("loops", None), "replace": ("replace", None), "prepend": (None, "prepend")}


@pytest.fixture
def hostile(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Tokenizer]:
    template, parts = request.param
    text = HEALTHY if template is None else TEMPLATES[template]
    tokenizer = load(hostile_folder(tmp_path, text, TOKENIZERS.get(parts)))
    with tokenizer.kept():
        yield tokenizer


@pytest.mark.alone
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("hostile", SLOWEST.values(), ids=SLOWEST, indirect=True)
async def test_the_server_answers_all_the_while(server: str, hostile: Tokenizer) -> None:
    """A call that needs no text, and one of the same model that brings its tokens."""
    async with serving(server) as served:
        served.gateway.models[0].encoder = PromptEncoder(hostile)
        for raw in (get("/live"), post("/v1/completions", {"model": "m", "prompt": [1], "n": 99})):
            await served.ask(raw)  # what is made at first use is made now
        seconds, statuses = await _canaries_during(served)
    seconds.sort()
    print(f"{len(seconds)} canaries, p95 {seconds[-len(seconds) // 20]:.4f} s, {seconds[-1]:.4f} s")
    assert statuses == [400] * NUM_CALLS
    assert len(seconds) >= 10
    assert seconds[-len(seconds) // 20] <= CANARY_S


@pytest.mark.alone
async def test_a_warm_call_costs_little_more(tmp_path: Path) -> None:
    """Than one that is rendered in a thread and encoded in place."""
    isolated = load(hostile_folder(tmp_path, HEALTHY, TOKENIZERS["regex"]))
    with isolated.kept():
        apart_s = await _chat_s(PromptEncoder(isolated))
    plain_s = await _chat_s(PromptEncoder(load(Path("sage-tiny"))))
    print(f"a chat of 64 characters: {apart_s * 1e6:.0f} us, in the process {plain_s * 1e6:.0f} us")
    assert apart_s - plain_s <= WARM_S


async def _chat_s(encoder: PromptEncoder) -> float:
    """A fast one of many: the first quartile."""
    seconds = []
    for _ in range(200):
        began_s = time.perf_counter()
        await encoder.chat([{"role": "user", "content": "a b " * 16}])
        seconds.append(time.perf_counter() - began_s)
    return statistics.quantiles(seconds)[0]


async def _canaries_during(served: Served) -> tuple[list[float], list[int]]:
    """How long /live took while chats of a hostile model were refused, and their statuses."""
    seconds: list[float] = []
    statuses: list[int] = []

    async def ask_hostile() -> None:
        body = {"model": "m", "messages": MESSAGES}
        statuses.append((await served.ask(post("/v1/chat/completions", body))).status)

    async with trio.open_nursery() as nursery:
        for _ in range(NUM_CALLS):
            nursery.start_soon(ask_hostile)
        while len(statuses) < NUM_CALLS:
            began_s = time.monotonic()
            assert (await served.ask(get("/live"))).status == 200
            seconds.append(time.monotonic() - began_s)
    return seconds, statuses


CAUSES = {
    "loops": ("loops", None, "the model's chat template took more than 0.25 s of CPU time"),
    "an attribute": ("an attribute", None, "chat template does not admit them"),
    "memory": ("mul", None, "the model's chat template took more than 256 MiB of memory"),
    "a long text": ("long", None, "the model's chat template made more than 4"),
    "a surrogate": ("a surrogate", None, "chat template does not admit them"),
    "prepend": (None, "prepend", "the model's tokenizer took more than"),
}


@pytest.mark.parametrize(("template", "parts", "cause"), CAUSES.values(), ids=CAUSES)
async def test_a_client_is_told_the_cause(
    tmp_path: Path, template: str | None, parts: str | None, cause: str
) -> None:
    text = HEALTHY if template is None else TEMPLATES[template]
    tokenizer = load(hostile_folder(tmp_path, text, TOKENIZERS.get(parts or "")))
    asked = {"messages": [{"role": "user", "content": "a" * 500}]}
    with tokenizer.kept():
        for endpoint in (chat, tokenize):
            answered = await call(endpoint, playing(), asked, tokenizer=tokenizer)
            assert answered.status == 400
            assert answered.json["error"]["param"] == "messages"
            assert cause in answered.json["error"]["message"]


FIELDS = {
    "in place": {"prompt": "a" * 900},
    "in a thread": {"prompt": "a" * 20_000},
    "bad_words": {"prompt": [1], "bad_words": ["a" * 256] * 9},
}


@pytest.mark.parametrize("asked", FIELDS.values(), ids=FIELDS)
async def test_the_field_that_a_tokenizer_refuses_is_named(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    tokenizer = load(hostile_folder(tmp_path, tokenizer=TOKENIZERS["prepend"]))
    with tokenizer.kept():
        answered = await call(completions, playing(), asked, tokenizer=tokenizer)
    assert answered.status == 400
    assert answered.json["error"]["param"] == list(asked)[-1]


async def test_without_a_helper_the_server_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load(hostile_folder(tmp_path, HEALTHY))
    assert tokenizer.isolated_template is not None

    async def refuse(*asked: Any) -> str:
        raise HelperUnavailable("none")

    monkeypatch.setattr(tokenizer.isolated_template, "render_async", refuse)
    answered = await call(chat, playing(), {"messages": MESSAGES}, tokenizer=tokenizer)
    assert (answered.status, answered.json["error"]["code"]) == (503, "tokenizer_busy")
