"""The seven parts of docs/extending.md come from outside the tree: registered, and as a package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = ROOT / "examples"
PROGRAMS = sorted(set(re.findall(r"\[examples/(own_\w+\.py)\]", PAGE)))
MOST_LINES = 40

ENTRY_POINTS = """\
[sagellm.policies]
shortest_first = own_policy:shortest_first
[sagellm.strategies]
in_bursts = own_strategy:InBursts
[sagellm.model_families]
OwnForCausalLM = own_family:FAMILY
[sagellm.backends]
counting = own_backend:BACKEND
[sagellm.transports]
file = own_transport
[sagellm.engines]
roofline = own_engine_kind:KIND
[sagellm.chat_formats]
bars = own_chat_format:BARS
"""
PLAIN = """\
sagellm: 1
name: own
engines:
  b: {model: MODEL, device: counting}
  r: {kind: roofline, replicas: 2}
models:
  counted: {name: counted}
  timed: {name: timed}
operators:
  sort: {op: policy_sort, policy: shortest_first}
  choose: {op: route_model, models: [counted, timed]}
  route: {op: route, strategy: in_bursts, strategy_options: {length: 3}}
  count: {op: generate, engine: b}
  time: {op: generate, engine: r}
edges:
  - source -> sort -> choose
  - choose.counted -> count -> sink
  - choose.timed -> route -> time -> sink
executor: {kind: tasks}
"""
DISAGGREGATED = """\
sagellm: 1
name: own
engines:
  p: {model: sage-tiny}
  d: {model: sage-tiny}
operators:
  prefill: {op: prefill, engine: p}
  transfer: {op: kv_transfer}
  decode: {op: decode, engine: d}
edges:
  - source -> prefill -> transfer -> decode -> sink
executor: {kind: processes, kv: file, num_spares: 0}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the seven examples as one package, outside the source tree."""
    folder = tmp_path_factory.mktemp("site")
    for program in PROGRAMS:
        (folder / program).write_bytes((EXAMPLES / program).read_bytes())
    info = folder / "own_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def run(site: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`sagellm` in a process that finds the package, as after `pip install`."""
    return python(site, "-m", "sagellm", *arguments)


def python(site: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join((str(site), *filter(None, [os.environ.get("PYTHONPATH")])))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=site,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=110,
    )


def own_folder(site: Path) -> Path:
    """sage-tiny's folder, under the architecture of the example."""
    from sagellm.runtime.models.folder import BUILT_IN

    folder = site / "own_model"
    folder.mkdir(exist_ok=True)
    for path in BUILT_IN["sage-tiny"].glob("*.*"):  # not how it embeds, in a subfolder
        text = path.read_bytes()
        if path.name == "config.json":
            text = text.replace(b"Qwen3ForCausalLM", b"OwnForCausalLM")
        (folder / path.name).write_bytes(text)
    return folder


def test_there_are_seven_programs() -> None:
    assert len(PROGRAMS) == 7
    assert len(ENTRY_POINTS.splitlines()) == 14


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_is_short_and_stands_in_the_page_as_it_is(program: str) -> None:
    lines = (EXAMPLES / program).read_text().splitlines()
    assert len(lines) <= MOST_LINES
    shown = "\n".join(f"    {line}" if line else "" for line in lines)
    assert shown in PAGE


def test_a_package_brings_policy_strategy_family_backend_and_kind(site: Path) -> None:
    graph = site / "own.yaml"
    graph.write_text(PLAIN.replace("MODEL", str(own_folder(site))))
    for model, said in (("counted", '"token_ids":[0,1,2]'), ("timed", '"completion_tokens":3')):
        done = run(
            site, "run", str(graph), "--model", model, "--prompt", "one", "--max-tokens", "3",
            "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert said in done.stdout.replace(" ", "")


def test_a_package_brings_a_transport_to_worker_processes(site: Path) -> None:
    """The parts are found in the workers too, which imported nothing of the caller's."""
    graph = site / "disaggregated.yaml"
    graph.write_text(DISAGGREGATED)
    done = run(site, "run", str(graph), "--chat", "--prompt", "What is 23 + 45?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "68"


def test_a_package_brings_a_chat_format(site: Path) -> None:
    program = "from sagellm.chat_formats import format_of; print(format_of('|@ <tool_call>').name)"
    assert python(site, "-c", program).stdout.strip() == "bars"
    assert python(EXAMPLES.parent, "-c", program).stdout.strip() == "hermes"


REFUSED = {
    "shortest_first": "{op: policy_sort, policy: shortest_first}",
    "in_bursts": "{op: route, strategy: in_bursts}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_without_the_package_an_operator_s_part_is_refused(name: str, tmp_path: Path) -> None:
    first = f"sagellm: 1\nname: g\noperators:\n  first: {REFUSED[name]}\n"
    assert name in refusal(tmp_path, f"{first}  last: {{op: generate, engine: e}}\n{ENGINE}")


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("counting", "device: counting"),
        ("roofline", "kind: roofline"),
        ("Own", "model: ./own_model"),
    ],
)
def test_without_the_package_an_engine_s_part_is_refused(
    name: str, engine: str, tmp_path: Path
) -> None:
    own_folder(tmp_path)
    graph = "sagellm: 1\nname: g\noperators:\n  first: {op: generate, engine: e}\n" + ENGINE
    graph = graph.replace("first -> last", "first").replace("model: sage-tiny", engine)
    assert name in refusal(tmp_path, graph)


ENGINE = "engines:\n  e: {model: sage-tiny}\nedges:\n  - source -> first -> last -> sink\n"


def refusal(folder: Path, graph: str) -> str:
    """What `graph check` says of a graph where the package is not installed."""
    path = folder / "own.yaml"
    path.write_text(graph)
    done = run(folder, "graph", "check", str(path))
    assert done.returncode == 2, done.stdout
    return done.stderr
