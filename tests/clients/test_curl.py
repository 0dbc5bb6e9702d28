"""curl with the commands of the README."""

import json
import subprocess

KEY = "sk-of-the-tests"
CHAT = {"messages": [{"role": "user", "content": "What is 23 + 45?"}], "temperature": 0}


def ask(curl, url, body, *options):
    command = [curl, "-sS", *options, f"{url}/v1/chat/completions", "-H"]
    command += [f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json", "-d"]
    return subprocess.check_output([*command, json.dumps(body)], timeout=30).decode()


def test_a_whole_answer(curl, url):
    answer = json.loads(ask(curl, url, CHAT))
    assert answer["choices"][0]["message"]["content"].strip() == "68"


def test_a_stream_of_events(curl, url):
    lines = ask(curl, url, {**CHAT, "stream": True}, "-N").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    deltas = (event["choices"][0]["delta"].get("content") or "" for event in events)
    assert "".join(deltas).strip() == "68"
