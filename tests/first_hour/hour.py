"""A user's first hour in an empty folder: install a wheel, serve own code, make ten mistakes.

    python tests/first_hour/hour.py [--python PYTHON ...] [--beside PREFIX ...]

builds a wheel and, for each Python, installs it into a new environment with a home of its own.
Every step is a command of the documents, or a mistake; its exit code and output are compared. Takes
a minute or two a Python, and the download of torch. `--beside` takes torch and other packages from
an existing environment.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
START_S, STEP_S = 120.0, 300.0
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


class Said(NamedTuple):
    """The exit code and output of a command."""

    code: int
    text: str


class Step(NamedTuple):
    """A command, its exit code, and texts that it must print."""

    command: str
    code: int
    shown: tuple[str, ...]


class Person:
    """A folder, an environment and a home that are new."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder = folder
        self._bin = python.parent
        home = folder / "home"
        home.mkdir(parents=True)
        self._env = {
            "PATH": f"{self._bin}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, command: str) -> Said:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=STEP_S,
        )
        return Said(done.returncode, done.stdout)

    @contextmanager
    def serving(self, arguments: str) -> Iterator[str]:
        """The address of `sagellm serve`, which ends by Ctrl-C with exit code 0."""
        log = self.folder / "serve.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                ["bash", "-c", f"exec sagellm serve {arguments} --port 0"],
                cwd=self.folder,
                env=self._env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            yield _ready(process, log)
            process.send_signal(2)
            check(f"Ctrl-C of serve {arguments}", process.wait(30) == 0, log.read_text())
        finally:
            process.kill()


def _ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Wait for the address, and for the first token through the graph."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        found = ADDRESS.search(log.read_text())
        if found and get(f"{found[0]}/ready")[0] == 200:
            return found[0]
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def get(url: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
    """Status and JSON of a GET, or of a POST with a body; status 0 without a server."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")
    except urllib.error.URLError:
        return 0, None


def check(name: str, holds: bool, said: object) -> None:
    print(f"{'ok    ' if holds else 'FAILED'} {name}", flush=True)
    if not holds:
        raise SystemExit(f"{name}:\n{said}")


OWN_CODE = """
import sagellm

@sagellm.function
def expand_tabs(request):
    return request.prompt.replace("\\t", "    ")

@sagellm.function
def in_angles(answer):
    return f"<{answer.text.strip()}>"

@sagellm.function
def broken(answer):
    return answer.text["no such key"] if "68" in answer.text else answer.text

def second(candidates, now, draw):
    return candidates.numbers[-1]

sagellm.register_strategy("second", second)
"""

OWN_GRAPH = """
sagellm: 1
name: own
imports: [own.py]
engines:
  g: {model: sage-tiny, device: cpu, replicas: 2}
operators:
  before:   {op: map, function: expand_tabs}
  sort:     {op: policy_sort, policy: fifo}
  route:    {op: route, strategy: second}
  generate: {op: generate, engine: g}
  whole:    {op: collect}
  after:    {op: map, function: in_angles}
edges:
  - source -> before -> sort -> route -> generate -> whole -> after -> sink
executor: {kind: tasks}
"""

FIRST = (
    Step("sagellm --help", 0, ("serve", "completion")),
    Step("sagellm version", 0, ("sagellm", "python", "torch")),
    Step("sagellm doctor", 0, ("compiler", "sage-tiny")),
    Step('sagellm run pd --prompt "What is 23 + 45?" --chat', 0, ("68",)),
    Step("sagellm graph check pd", 0, ()),
    Step("sagellm graph show pd", 0, ("prefill",)),
    Step('sagellm run sage-tiny --prompt "What is 23 + 45?" --chat', 0, ("68",)),
    Step("sagellm graph check map", 0, ()),
    Step('sagellm run map --prompt "What is 23 + 45?" --chat', 0, ("68",)),
    Step("sagellm graph check own.yaml", 0, ()),
    Step('sagellm run own.yaml --prompt "What is 23 + 45?" --chat', 0, ("<68>",)),
)

# Ten mistakes; each shows a cause and a fix, exits with 2 and has no traceback.
MISTAKES = (
    Step("sagellm rum", 2, ("rum", "run")),
    Step("sagellm run pdd --prompt a", 2, ("pdd", "did you mean pd")),
    Step("sagellm run pd", 2, ("--prompt", "--input")),
    Step("sagellm run pd --prompt a --set splitt.x=1", 2, ("splitt", "did you mean split")),
    Step("sagellm run pd --prompt a --max-tokens 100000", 2, ("100000",)),
    Step("sagellm run pd --prompt a --model ./nowhere", 2, ("there is no such folder", "--model")),
    Step("sagellm run pd --input nowhere.jsonl", 2, ("nowhere.jsonl",)),
    Step("sagellm run map --set before.function=rewrite_promt --prompt a", 2, ("rewrite_prompt",)),
    Step("sagellm run pd --import nowhere.py --prompt a", 2, ("nowhere.py",)),
    Step("sagellm serve pd --host 0.0.0.0", 2, ("--api-key",)),
)


def play(person: Person) -> None:
    """Run every step of the hour. Raises SystemExit at the first step that fails."""
    (person.folder / "own.py").write_text(OWN_CODE)
    (person.folder / "own.yaml").write_text(OWN_GRAPH)
    for step in (*FIRST, *MISTAKES):
        said = person.run(step.command)
        held = said.code == step.code and all(text in said.text for text in step.shown)
        check(step.command, held and "Traceback" not in said.text, said)
    serve_a_model(person)
    serve_own_code(person)


def serve_a_model(person: Person) -> None:
    question = [{"role": "user", "content": "What is 23 + 45?"}]
    with person.serving("sage-tiny") as url:
        status, answer = get(f"{url}/v1/chat/completions", {"messages": question, "temperature": 0})
        check("a chat over HTTP", status == 200 and said_by(answer) == "68", answer)
        status, answer = get(f"{url}/v1/chat/completions", {"mesages": question})
        message = answer["error"]["message"]
        check("a misspelt field", status == 400 and "did you mean `messages`" in message, answer)
        status, answer = get(f"{url}/v1/chat/completion", {"messages": question})
        named = "/v1/chat/completions" in answer["error"]["message"]
        check("a misspelt path", status == 404 and named, answer)


def serve_own_code(person: Person) -> None:
    question = [{"role": "user", "content": "What is 23 + 45?"}]
    asked = {"messages": question, "temperature": 0}
    for others in ("", " --gateways 1", " --executor processes"):
        with person.serving(f"own.yaml{others}") as url:
            status, answer = get(f"{url}/v1/chat/completions", asked)
            check(f"own code{others}", status == 200 and said_by(answer) == "<68>", answer)
    with person.serving("map --import own.py --set after.function=broken") as url:
        status, answer = get(f"{url}/v1/chat/completions", asked)
        message = answer["error"]["message"]
        check("own code that fails: its type", status == 500 and "TypeError" in message, answer)
        check("own code that fails: not its text", "no such key" not in message, answer)
    log = (person.folder / "serve.log").read_text()
    check("own code that fails: its line, in the log", "own.py" in log, log)


def said_by(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def make_environment(folder: Path, python: str, wheel: Path, beside: str | None) -> Path:
    """Make an environment with the wheel; returns its Python."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    own = folder / "bin" / "python"
    if beside is not None:
        (there,) = Path(beside).glob("lib/python3.*/site-packages")
        (here,) = folder.glob("lib/python3.*/site-packages")
        (here / "beside.pth").write_text(f"{there}\n")
    install = [own, "-m", "pip", "install", "--quiet", "--no-compile"]
    constraints = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*install, *constraints, wheel], check=True)
    if beside is not None:  # that environment may contain another sagellm
        subprocess.run([*install, "--no-deps", "--ignore-installed", wheel], check=True)
    return own


def build_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--python", action="append", help="may be repeated [default: this one]")
    parser.add_argument("--beside", action="append", help="an environment for each Python, or none")
    given = parser.parse_args()
    pythons = given.python or [sys.executable]
    besides = given.beside or [None] * len(pythons)
    folder = Path(tempfile.mkdtemp(prefix="first-hour-"))
    try:
        wheel = build_wheel(folder)
        for number, (python, beside) in enumerate(zip(pythons, besides, strict=True)):
            print(f"# {python}", flush=True)
            own = make_environment(folder / f"env-{number}", python, wheel, beside)
            play(Person(folder / f"hour-{number}", own))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    main()
