"""LiteLLM's proxy, a process of its own, between the clients of both APIs and the server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

proxy = pytest.importorskip("litellm.proxy.proxy_cli")
anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")


KEY = "sk-of-the-tests"
PROXY_KEY = "sk-proxy-7c1f0e9ab25d4c6f8e13b7a09d54f2c6"
START_S = 90.0
QUESTION = [{"role": "user", "content": "What is 23 + 45?"}]
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "parameters": SCHEMA, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
FORM = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
# The same server, as LiteLLM's providers of its three APIs see it.
PROVIDERS = {"openai": "/v1", "hosted_vllm": "/v1", "anthropic": ""}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_live(base):
    try:
        with urllib.request.urlopen(f"{base}/health/liveliness", timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def base(url, tmp_path_factory):
    """The address of a proxy that has a model for each provider."""
    folder = tmp_path_factory.mktemp("proxy")
    models = [
        {
            "model_name": name,
            "litellm_params": {
                "model": f"{name}/sage-tiny",
                "api_base": url + path,
                "api_key": KEY,
            },
        }
        for name, path in PROVIDERS.items()
    ]
    (folder / "config.yaml").write_text(json.dumps({"model_list": models}))
    port = free_port()
    command = [Path(sys.executable).with_name("litellm"), "--config", folder / "config.yaml"]
    settings = {"LITELLM_MASTER_KEY": PROXY_KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log, stderr=log, env={**os.environ, **settings},
        )  # fmt: skip
    base, until = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    while not is_live(base):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"the proxy did not start: {(folder / 'log').read_text()[-2000:]}")
        time.sleep(0.2)
    yield base
    process.terminate()
    process.wait(30)


@pytest.fixture(params=PROVIDERS)
def model(request):
    return request.param


@pytest.fixture
def client(base):
    with openai.OpenAI(base_url=f"{base}/v1", api_key=PROXY_KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def messages(base):
    with anthropic.Anthropic(base_url=base, api_key=PROXY_KEY, max_retries=0) as client:
        yield client.messages


def test_a_chat_is_answered_and_streamed(client, model):
    fields = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 64}
    whole = client.chat.completions.create(**fields).choices[0].message.content
    with client.chat.completions.create(**fields, stream=True) as stream:
        pieces = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
    assert "".join(pieces).strip() == whole.strip() == "68"


def test_a_chat_calls_a_tool(client, model):
    fields = {"model": model, "messages": ASKED, "temperature": 0, "max_tokens": 256}
    first = client.chat.completions.create(**fields, tools=[TOOL]).choices[0]
    (call,) = first.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    with client.chat.completions.stream(**fields, tools=[TOOL], tool_choice="required") as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed[0].function.parsed_arguments["city"] in ("Paris", "Rome")
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    fields["messages"] = [*ASKED, first.message, result]
    last = client.chat.completions.create(**fields, tools=[TOOL]).choices[0].message
    assert "rain" in last.content


def test_a_chat_has_the_form_of_a_schema(client, model):
    fields = {"model": model, "messages": ASKED, "temperature": 0, "max_tokens": 256}
    answer = client.chat.completions.create(**fields, response_format=FORM)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


def test_a_response_is_made_and_streamed(client, model):
    fields = {"model": model, "input": QUESTION[0]["content"], "temperature": 0}
    assert client.responses.create(**fields).output_text.strip() == "68"
    with client.responses.stream(**fields) as stream:
        assert stream.get_final_response().output_text.strip() == "68"


def test_a_message_is_made_and_streamed(messages, model):
    tool = {"name": "get_weather", "input_schema": SCHEMA}
    fields = {"model": model, "messages": ASKED, "max_tokens": 256, "tools": [tool]}
    fields["extra_body"] = {"temperature": 0}
    whole = messages.create(**fields)
    (use,) = [block for block in whole.content if block.type == "tool_use"]
    assert (whole.stop_reason, use.input) == ("tool_use", {"city": "Paris"})
    with messages.stream(**fields) as stream:
        streamed = stream.get_final_message()
    assert [block.input for block in streamed.content if block.type == "tool_use"] == [use.input]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
    fields["messages"] = [*ASKED, whole.to_param(), {"role": "user", "content": [result]}]
    assert "rain" in messages.create(**fields).content[0].text


@pytest.mark.parametrize("model", ["openai", "anthropic"])  # the others count by themselves
def test_the_server_counts_tokens(client, messages, model):
    asked = [{"role": "user", "content": "What is the weather in Paris?" * 9}]
    counted = messages.count_tokens(model=model, messages=asked).input_tokens
    answer = client.chat.completions.create(model=model, messages=asked, max_tokens=1)
    assert counted == answer.usage.prompt_tokens


def test_an_error_of_the_server_comes_through(client, messages, model):
    fields = {"model": model, "messages": QUESTION}
    with pytest.raises(openai.BadRequestError, match="temperature: is -1"):
        client.chat.completions.create(**fields, temperature=-1)
    with pytest.raises(anthropic.BadRequestError, match="temperature: is -1"):
        messages.create(**fields, max_tokens=8, extra_body={"temperature": -1})
