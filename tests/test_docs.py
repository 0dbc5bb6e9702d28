"""What README and docs/ show works as it stands there."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
from gateway_process import served_process

import sagellm
from sagellm import Graph, Sampling
from sagellm.builder import RESOLVER
from sagellm.cli import main
from sagellm.cli.config_file import as_toml, read_config
from sagellm.cli.serve_options import CONFIG_FILE_OPTIONS
from sagellm.cli.setting import LIMITS as SET_BY_LIMIT
from sagellm.cli.setting import settings_of
from sagellm.gateway.batches.batch_store import MAX_RECORDS
from sagellm.gateway.batches.input_lines import MAX_CUSTOM_ID_LEN
from sagellm.gateway.encoding import TEMPLATE_S, TOKENIZE_S
from sagellm.gateway.grammar_checks import CHECK_S
from sagellm.gateway.http.routes import ROUTES
from sagellm.gateway.http.uploads import MAX_FIELD_BYTES, MAX_FILENAME_LEN
from sagellm.gateway.protocol import other_apis
from sagellm.gateway.protocol.anthropic_fields import SENT_OBJECTS, MessagesRequest
from sagellm.gateway.protocol.bodies import ChatRequest, CompletionRequest
from sagellm.gateway.protocol.chat_messages import (
    MAX_PARTS,
    MAX_VARIABLE_LEN,
    MAX_VARIABLES,
)
from sagellm.gateway.protocol.json import MAX_BRACKETS, MAX_QUOTES, MOST
from sagellm.gateway.protocol.request import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_ALTERNATIVES,
    MAX_BAD_WORD_LEN,
    MAX_BAD_WORDS,
    MAX_HINT_LEN,
    MAX_SALT_LEN,
    MAX_STOP_TOKEN_IDS,
    MAX_WAIT_S,
)
from sagellm.gateway.protocol.responses_fields import (
    RENAMED,
    RESPONSES,
    SHARED,
    ResponsesRequest,
)
from sagellm.gateway.protocol.tool_choice import MAX_TOOLS
from sagellm.gateway.settings import Budget, RequestLimits, StorageLimits, Streaming
from sagellm.graphs.text.yaml import load
from sagellm.opening.checking import check_graph
from sagellm.operators.policies import POLICIES
from sagellm.operators.routing import STRATEGIES
from sagellm.runtime.messages import CODES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
GRAPHS, STRUCTURE, SERVING, SECURITY, CONFIGURATION, BATCHES, ROUTING = (
    (ROOT / "docs" / f"{name}.md").read_text()
    for name in (
        "graphs", "structure", "serving", "security", "configuration", "batches", "routing",
    )
)  # fmt: skip
LIMITS = SECURITY.split("## Limits")[1].split("\n## ")[0]
SERVED_AT = "http://127.0.0.1:8000"
FLOORS = ("graphs", "backends", "runtime", "operators", "sagellm")


def block(text: str, first_words: str) -> str:
    """The indented block that begins with these words, without its indent."""
    start = text.index(f"    {first_words}")
    lines = text[start:].splitlines()
    end = next(at for at, line in enumerate(lines) if line and not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[:end])


def test_the_yaml_in_the_docs_is_right() -> None:
    graph = check_graph(load(block(GRAPHS, "sagellm: 1"), file="docs"), RESOLVER)
    assert graph.name == "pd"


def test_the_dsl_in_the_docs_is_right() -> None:
    names: dict[str, Any] = {}
    exec(block(GRAPHS, "from sagellm import Graph, ops"), names)
    graph: Graph = names["graph"]
    assert check_graph(graph.document, RESOLVER).name == "pd"


def test_the_strategy_and_the_policy_in_the_docs_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STRATEGIES, "_registered", {})
    monkeypatch.setattr(POLICIES, "_registered", {})
    scope: dict[str, Any] = {"__name__": "docs"}
    exec(block(GRAPHS, "from dataclasses import dataclass"), scope)
    exec(block(GRAPHS, "@dataclass(frozen=True)\n    class LongestFirst"), scope)
    graph = Graph("g").engine("g", model="null", device="null", replicas=2)
    head = graph >> sagellm.ops.policy_sort("longest_first", policy_options={"weight": 2.0})
    route = sagellm.ops.route("warm_first", strategy_options={"patience_s": 0.5})
    head >> route >> sagellm.ops.generate(engine="g")
    with graph.open() as session:
        warm = [
            session.generate("a" * 40, sampling=Sampling(max_tokens=1)).num_cached_tokens
            for _ in range(3)
        ]
    assert warm == [0, 32, 32]


def test_the_strategy_in_the_page_on_routing_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(STRATEGIES, "_registered", {})
    program = block(ROUTING, "from dataclasses import dataclass")
    assert len(program.strip().splitlines()) <= 24  # four of them empty
    exec(program, {"__name__": "docs"})
    assert capsys.readouterr().out == "length\n"


def test_every_strategy_is_in_the_page_on_routing_with_its_options() -> None:
    definitions, options = ROUTING.split("## Options and definitions")
    rows = re.findall(r"^\| `(\w+)` \|", definitions, re.M)
    assert rows == [*STRATEGIES.ours]
    known = {
        (name, option.name)
        for name, strategy in STRATEGIES.ours.items()
        if is_dataclass(strategy)
        for option in fields(strategy)
    }
    named, found = list[str](), set[tuple[str, str]]()
    for names, cell in re.findall(r"^\| ([^|]*) ?\| (`[^|]*) \|", options, re.M):
        named = re.findall(r"`(\w+)`", names) or named
        found |= {(name, option) for name in named for option in re.findall(r"`(\w+)`", cell)}
    assert found == known


PAIRS = """\
sagellm: 1
name: pairs
engines:
  p: {model: "null", device: "null", replicas: 2}
  d: {model: "null", device: "null", replicas: 4}
operators:
  prefill: {op: prefill, engine: p}
  transfer: {op: kv_transfer}
  decode: {op: decode, engine: d}
ROUTE
edges:
  - source -> route -> prefill -> transfer -> decode -> sink
"""


def test_the_places_in_the_page_on_routing_are_right(tmp_path: Path) -> None:
    route = indent(block(ROUTING, "route:\n      op: route"), "  ")
    (tmp_path / "pairs.yaml").write_text(PAIRS.replace("ROUTE", route))
    with Graph.load(tmp_path / "pairs.yaml").open() as session:
        answer = session.generate([1, 2, 3], sampling=Sampling(max_tokens=2))
    assert answer.finish_reason == "length"


def test_the_program_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block(README, "import trio"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", re.findall(r"    sagellm (graph .+|doctor)", README))
def test_the_commands_in_the_readme_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split("#")[0].split()) == 0


def test_options_in_the_docs_are_those_there_are() -> None:
    rows = re.findall(r"^\| (`\w+`[^|]*) \| ([^|]*) \|", GRAPHS.split("## Operators")[1], re.M)
    for ops, options in rows:
        for op in re.findall(r"`(\w+)`", ops):
            known = RESOLVER.operator(op).spec.option_types
            named = re.findall(r"`(\w+)`", re.sub(r": .*?(?=\(|$)", "", options))
            assert set(named) <= set(known), op


def test_every_folder_is_in_the_structure() -> None:
    """`rglob` does not follow the links in sagellm/."""
    files = (path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
    folders = {path.parent.relative_to(ROOT).as_posix() for path in files}
    missing = {folder for folder in folders if f"`{folder}/`" not in STRUCTURE}
    assert missing <= {"backends/cpu/native"}


def test_every_file_named_in_the_structure_is_there() -> None:
    named = re.findall(r"`([\w/]+/\w+\.py)`", STRUCTURE)
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of what the README starts."""
    with served_process(graph="graphs/pd.yaml") as served:
        yield served.url


def test_the_curl_line_in_the_readme_is_answered(url: str) -> None:
    line = block(README, "curl ").replace(SERVED_AT, url).replace("\\\n", " ")
    done = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=30)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "68"


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(block(README, "from openai"), id="readme, openai"),
        pytest.param(block(README, "from sagellm import Unified"), id="readme, own client"),
        pytest.param(block(SERVING, "from sagellm import Unified"), id="serving, own client"),
    ],
)
def test_the_clients_in_the_docs_get_answers(
    program: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(program.replace(SERVED_AT, url), {})
    assert capsys.readouterr().out.startswith("68")


def test_the_batch_in_the_docs_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = block(BATCHES, "import json")
    with served_process("--data-dir", str(tmp_path), graph="sage-tiny") as served:
        exec(program.replace(SERVED_AT, served.url), {})
    counts, *names = capsys.readouterr().out.splitlines()
    assert "completed=100, failed=0" in counts
    assert sorted(names) == sorted(f"sum-{number}" for number in range(100))


def commands(text: str) -> list[str]:
    return [line.split(" #")[0].strip() for line in re.findall(r"^    sagellm (.+)", text, re.M)]


@pytest.mark.parametrize(
    "command",
    [*commands(README), *commands(SERVING), *commands(CONFIGURATION), *commands(BATCHES)],
)
def test_the_options_in_the_docs_are_known(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *rest = command.split()
    name = f"{name} {rest[0]}" if name in ("bench", "graph") else name
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert [one for one in re.findall(r"--[a-z-]+", command) if one not in shown] == []


def test_every_option_of_serve_is_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["serve", "--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert known - set(re.findall(r"--[a-z][a-z-]+", SERVING)) == set()


def test_every_endpoint_is_in_the_docs_with_its_access() -> None:
    table = SERVING.split("## Endpoints")[1].split("###")[0]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| `")]
    access = {path: words for cell, words, *_ in rows for path in re.findall(r"/[\w/{}.]+", cell)}
    for route in ROUTES:
        said = access[route.path.replace(":path", "")]
        assert said == ("key" if route.access in ("user", "metrics") else route.access), route


def test_every_field_of_a_request_is_in_the_docs() -> None:
    table = SERVING.split("### Fields")[1].split("**Refused**")[0]
    named = set(re.findall(r"`(\w+)`", table))
    fields = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    assert fields - named == set()


def test_every_field_of_a_response_is_in_the_docs() -> None:
    section = SERVING.split("### Responses")[1].split("## Streams")[0]
    fields = {*ResponsesRequest.__struct_fields__, *RENAMED, *SHARED}
    fields |= {*RESPONSES.unbuilt, *RESPONSES.taken}
    assert fields - set(re.findall(r"`(\w+)(?::|`)", section)) == set()


def test_every_field_that_is_taken_is_in_the_docs_with_type_and_reason() -> None:
    rows = re.findall(r"^\| ([\w ]+) \| `(\w+)` \| (\w+) \| (.+) \|$", SERVING, re.M)
    tables = {
        "request": other_apis.REQUEST.taken,
        "message": other_apis.MESSAGE.taken,
        "part": other_apis.PART.taken,
        "tool": other_apis.TOOL.taken,
        "tool function": other_apis.TOOL_FUNCTION.taken,
        "tool call": other_apis.TOOL_CALL.taken,
        "function": other_apis.FUNCTION_CALL.taken,
    }
    known = [
        (where, name, *field) for where, table in tables.items() for name, field in table.items()
    ]
    assert rows == known


def test_every_field_of_the_anthropic_api_is_in_the_docs() -> None:
    section = SERVING.split("## Messages")[1].split("## Errors")[0]
    named = set(re.findall(r"`(\w+)", section))
    asked = {*MessagesRequest.__struct_fields__}
    taken = {name for foreign in SENT_OBJECTS.values() for name in foreign.taken}
    assert asked | taken <= named


def test_the_scoring_in_the_docs_is_answered(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block(SERVING, "from openai").replace(SERVED_AT, url), {})
    assert float(capsys.readouterr().out) < 0


def test_the_limits_in_the_docs_are_those_that_hold() -> None:
    limits, stream, budget = RequestLimits(), Streaming(), Budget()
    storage = StorageLimits()
    for number in (
        limits.header_bytes >> 10, limits.num_headers, limits.header_s, limits.body_bytes >> 20,
        limits.all_bodies_bytes >> 20,
        limits.body_s, limits.json_depth, limits.num_prompts, limits.num_messages, MAX_PARTS,
        limits.num_choices, limits.num_stop, limits.stop_bytes, limits.num_logit_bias,
        limits.model_name_len, MAX_STOP_TOKEN_IDS, MAX_SALT_LEN, MAX_HINT_LEN, MAX_WAIT_S,
        MAX_ALLOWED_TOKEN_IDS, MAX_BAD_WORDS, MAX_BAD_WORD_LEN, MAX_TOOLS, MAX_VARIABLES,
        MAX_VARIABLE_LEN, MAX_BRACKETS // 2, MAX_QUOTES // 2, *MOST.values(), TEMPLATE_S,
        TOKENIZE_S, CHECK_S, MAX_ALTERNATIVES, stream.num_buffered_tokens,
        stream.num_buffered_bytes >> 10, stream.stall_s,
        budget.num_open, budget.num_waiting, budget.cancels_per_s,
        storage.upload_bytes >> 20, storage.upload_s, storage.num_files, storage.files_bytes >> 20,
        storage.all_files_bytes >> 20, storage.num_batches, storage.num_batch_requests,
        storage.num_batch_calls, MAX_CUSTOM_ID_LEN, MAX_FILENAME_LEN, MAX_RECORDS, MAX_FIELD_BYTES,
    ):  # fmt: skip
        shown = f"{number:,}".removesuffix(".0")
        assert re.search(rf"(?<![\d.,]){shown}(?!\d)", LIMITS), number


def settings_rows() -> Iterator[str]:
    """The tables of docs/configuration.md: what can be set, and its default."""
    apart = ("api_key", "import", "set")  # tables of a file; and --import, which a graph file has
    for struct in CONFIG_FILE_OPTIONS:
        for setting in settings_of(struct).values():
            if setting.name not in apart:
                default = (
                    "" if setting.default is None else f"`{as_toml(setting, setting.default)}`"
                )
                yield f"| `{setting.name}` | `{setting.option}` | {default} | {setting.doc} |"
    for setting in SET_BY_LIMIT.values():
        yield f"| `{setting.name}` | `{as_toml(setting, setting.default)}` | {setting.doc} |"


def test_every_setting_is_in_the_docs_as_it_is() -> None:
    missing = [row for row in settings_rows() if row not in CONFIGURATION]
    assert not missing, "\n".join(["docs/configuration.md lacks", *missing])
    rows = re.findall(r"^\| `.*\|$", CONFIGURATION, re.M)
    assert [row for row in rows if row not in set(settings_rows())] == []


def test_the_file_of_settings_in_the_docs_is_right(tmp_path: Path) -> None:
    shown = block(CONFIGURATION, "host = ")
    path = tmp_path / "serve.toml"
    path.write_text(shown)
    config = read_config(path, CONFIG_FILE_OPTIONS)
    assert config.limits
    assert config.keys
    assert config.set


def test_every_code_of_an_error_is_in_the_docs() -> None:
    table = SERVING.split("## Errors")[1].split("## Overload")[0]
    sources = (path.read_text() for path in (ROOT / "sagellm" / "gateway").rglob("*.py"))
    codes = {code for text in sources for code in re.findall(r'code="(\w+)"', text)}
    codes |= CODES.keys() - {"bad_request"}  # which has no code for clients
    assert len(codes) > 12
    assert {code for code in codes if f"`{code}`" not in table} == set()


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "GUARANTEES.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


VAGUE = re.compile(r"\bm[e]nd", re.IGNORECASE)
FOLDERS = (
    "graphs", "backends", "runtime", "operators", "sagellm", "benchmarks", "examples", "docs",
    "tests",
)  # fmt: skip


def test_every_fix_names_what_to_change() -> None:
    """To say only that something is to be made right is no fix."""
    found = [ROOT / "README.md", *(path for name in FOLDERS for path in (ROOT / name).rglob("*.*"))]
    texts = (path for path in found if path.suffix in (".py", ".md", ".c", ".h", ".yaml", ".js"))
    vague = [str(path) for path in texts if VAGUE.search(path.read_text(errors="replace"))]
    assert vague == []
