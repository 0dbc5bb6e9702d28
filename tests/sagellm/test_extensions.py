"""Registration of a user's own code, and entry points of installed packages."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from logged import logged

import sagellm
from sagellm import Graph, Request, RequestFailed, Sampling, ops
from sagellm.extensions import RESOLVER
from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.text.yaml import Document, load
from sagellm.graphs.vocabulary import OpSpec, Port
from sagellm.opening.checking import check_graph
from sagellm.operators.policies import POLICIES
from sagellm.operators.policies.order import Policy, PolicySortOptions, QueueOrder
from sagellm.operators.routing import STRATEGIES, Candidates
from sagellm.runtime.operator import Draw
from sagellm.runtime.registry import FUNCTIONS

GRAPH = """\
sagellm: 1
name: own
engines:
  g: {model: "null", device: "null", replicas: 2}
operators:
  sort: {op: policy_sort, policy: fifo}
  before: {op: filter, function: f}
  route: {op: route, strategy: random}
  generate: {op: generate, engine: g}
edges:
  - source -> sort -> before -> route -> generate -> sink
"""
PACKAGE = """\
from sagellm.graphs.vocabulary import OpSpec
from sagellm.operators.policies.order import Policy, QueueOrder
from sagellm.operators.filter import FilterOptions, build as build_filter

SPEC = OpSpec("fake_filter", options=FilterOptions)

def build(options, setup):
    return build_filter(options, setup)

def keep(item):
    return True

def newest(options):
    return Policy((QueueOrder(lambda request: -request.stamps.arrived_s),))

def last(candidates, now, draw):
    return candidates.numbers[-1]
"""
ENTRY_POINTS = """\
[sagellm.operators]
fake_filter = fake_package
fake_broken = fake_broken
[sagellm.functions]
fake_keep = fake_package:keep
fake_missing = fake_package:nothing
[sagellm.policies]
fake_newest = fake_package:newest
[sagellm.strategies]
fake_last = fake_package:last
fake_wrong = fake_package:SPEC
"""

FAILING = """\
from sagellm.graphs.vocabulary import REQUEST, NoOptions, OpSpec, Port

SPEC = OpSpec("fake_fails", (Port("in", REQUEST),), (Port("out", REQUEST),), options=NoOptions)

def fails(*given):
    return {}['x']

class Failing:
    initial = None
    on = fails

def build(options, setup):
    return Failing()
"""
FAILING_ENTRY_POINTS = """\
[sagellm.operators]
fake_fails = fails_package
[sagellm.functions]
fake_fails = fails_package:fails
[sagellm.strategies]
fake_fails = fails_package:fails
"""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove everything that a test registers and loads."""
    for table in (FUNCTIONS, POLICIES, STRATEGIES, RESOLVER._operators):
        monkeypatch.setattr(table, "_registered", dict(table._registered))
        monkeypatch.setattr(table, "_loaded", {})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution that Python takes for an installed one."""
    info = tmp_path / "fake-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "fake_package.py").write_text(PACKAGE)
    (tmp_path / "fake_broken.py").write_text("import sagellm\nimport nowhere\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "fake_package", raising=False)
    return tmp_path


def document(*changes: tuple[str, str]) -> Document:
    text = GRAPH
    for old, new in changes:
        text = text.replace(old, new)
    return load(text, file="own.yaml")


def written(folder: Path, *changes: tuple[str, str]) -> Path:
    text = GRAPH
    for old, new in changes:
        text = text.replace(old, new)
    (folder / "own.yaml").write_text(text)
    return folder / "own.yaml"


def mistakes(*changes: tuple[str, str]) -> list[str]:
    try:
        check_graph(document(*changes), RESOLVER, FUNCTIONS)
    except GraphError as error:
        return list(map(str, error.diagnostics))
    return []


def newest(options: PolicySortOptions) -> Policy:
    return Policy((QueueOrder(lambda request: -request.stamps.arrived_s),))


def last(candidates: Candidates, now: float, draw: Draw) -> int:
    return candidates.numbers[-1]


def test_what_is_registered_is_known_to_a_graph() -> None:
    @sagellm.function
    def keep_all(request: Request) -> bool:
        return True

    sagellm.register_policy("newest", newest)
    sagellm.register_strategy("last", last)
    own = (("fifo", "newest"), ("function: f", "function: keep_all"), ("random", "last"))
    assert mistakes(*own) == []


def test_a_decorator_may_give_another_name() -> None:
    @sagellm.function("kept")
    def keep_all(request: Request) -> bool:
        return True

    assert FUNCTIONS["kept"] is keep_all
    assert "keep_all" not in FUNCTIONS


def test_unknown_names_get_the_nearest() -> None:
    sagellm.register_function(lambda request: True, "keep_all")
    sagellm.register_policy("newest", newest)
    sagellm.register_strategy("rightmost", last)
    wrong = (("fifo", "newst"), ("function: f", "function: kep_all"), ("random", "rightmst"))
    told = mistakes(*wrong)
    assert [text.split("(")[1].split("?")[0] for text in told] == [
        "did you mean `newest`",
        "did you mean `keep_all`",
        "did you mean `rightmost`",
    ]


def test_a_clash_names_both_places() -> None:
    sagellm.register_function(len, "size")
    first = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="exists already") as raised:
        sagellm.register_function(len, "size")
    assert f"test_extensions.py:{first};" in str(raised.value)
    assert f"test_extensions.py:{first + 3}" in str(raised.value)


@pytest.mark.parametrize(
    ("register", "place"),
    [
        (lambda: sagellm.register_policy("fifo", newest), "ships with sagellm"),
        (lambda: sagellm.register_policy("own", newest), "choose another name"),
        (lambda: sagellm.register_strategy("random", last), "ships with sagellm"),
        (lambda: sagellm.register_operator(OpSpec("map"), last), "ships with sagellm"),  # type: ignore[arg-type]
        (lambda: sagellm.register_function(len, "a b"), "use letters"),
        (lambda: sagellm.register_function(lambda item: item), "use letters"),
        (lambda: sagellm.register_policy("mine", newest, uses=("wndow",)), "no option"),
    ],
)
def test_what_cannot_be_registered_is_refused(register: object, place: str) -> None:
    with pytest.raises(ValueError, match=place):
        register()  # type: ignore[operator]


def test_the_same_line_may_register_anew() -> None:
    for number in (1, 2):
        sagellm.register_function([number].append, "again")
    assert FUNCTIONS["again"].__self__ == [2]  # type: ignore[attr-defined]


def test_a_registered_function_keeps_its_name_in_a_graph_of_python() -> None:
    sagellm.register_function(len, "size")
    assert (Graph("g") >> ops.map(len)).ir.node("map").attrs["function"] == "size"


async def test_a_policy_and_a_strategy_of_ones_own_decide() -> None:
    chosen: list[int] = []

    def first(candidates: Candidates, now: float, draw: Draw) -> int:
        chosen.append(len(candidates.numbers))
        return 0

    sagellm.register_policy("newest", newest)
    sagellm.register_strategy("first", first)
    graph = Graph("g").engine("g", model="null", device="null", replicas=2)
    graph >> ops.policy_sort("newest") >> ops.route("first") >> ops.generate(engine="g")
    async with graph.open() as session:
        await session.generate("a", sampling=Sampling(max_tokens=1))
    assert chosen == [2]


def test_a_policy_that_uses_no_option_refuses_all() -> None:
    sagellm.register_policy("newest", newest, uses=("aging_s",))
    sagellm.register_function(lambda request: True, "f")
    assert mistakes(("policy: fifo", "policy: newest, aging_s: 3")) == []
    (told,) = mistakes(("policy: fifo", "policy: newest, busy_queued: 3"))
    assert "policy newest does not use busy_queued" in told


@pytest.mark.usefixtures("package")
def test_installed_packages_offer_all_four_kinds() -> None:
    own = (("fifo", "fake_newest"), ("random", "fake_last"), ("function: f", "function: fake_keep"))
    assert mistakes(*own, ("op: filter", "op: fake_filter")) == []


@pytest.mark.usefixtures("package")
def test_nothing_is_imported_unasked() -> None:
    sagellm.register_function(lambda request: True, "f")
    assert mistakes() == []
    assert "fake_broken" in RESOLVER.names
    assert "fake_package" not in sys.modules


def test_an_entry_point_that_is_broken_says_whose_it_is(package: Path) -> None:
    sagellm.register_function(lambda request: True, "f")
    (told,) = mistakes(("op: filter", "op: fake_broken"))
    assert told.startswith("own.yaml:7:16: operator 'fake_broken' of package fake cannot be loaded")
    assert f"No module named 'nowhere' ({package}/fake_broken.py:2)" in told
    (told,) = mistakes(("function: f", "function: fake_missing"))
    assert "of package fake cannot be loaded" in told
    (told,) = mistakes(("random", "fake_wrong"))
    assert "must be a function, not OpSpec" in told


@pytest.mark.parametrize(
    "change",
    [
        ("function: f", "function: fake_fails"),
        ("strategy: random", "strategy: fake_fails"),
        ("op: filter, function: f", "op: fake_fails"),
    ],
)
async def test_an_error_in_an_installed_package_is_named_as_ones_own(
    change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pip puts packages: `site-packages`, beside those that are nobody's own."""
    site = tmp_path / "site-packages"
    (site / "fails-1.0.dist-info").mkdir(parents=True)
    (site / "fails-1.0.dist-info" / "METADATA").write_text("Name: fails\nVersion: 1.0\n")
    (site / "fails-1.0.dist-info" / "entry_points.txt").write_text(FAILING_ENTRY_POINTS)
    (site / "fails_package.py").write_text(FAILING)
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    monkeypatch.delitem(sys.modules, "fails_package", raising=False)
    sagellm.register_function(lambda request: True, "f")
    line = FAILING.splitlines().index("    return {}['x']") + 1
    with logged() as lines:
        async with Graph.load(written(tmp_path, change)).open() as session:
            with pytest.raises(RequestFailed) as caught:
                await session.generate([1], sampling=Sampling(max_tokens=1))
    assert str(caught.value).endswith(f"KeyError: 'x' ({site}/fails_package.py:{line})")
    said = next(line for line in lines if line["event"] == "operator_failed")
    assert said["at"] == f"{site}/fails_package.py:{line}"
    assert "return {}['x']" in said["exception"]


@pytest.mark.usefixtures("package")
def test_a_clash_with_a_package_names_it() -> None:
    with pytest.raises(ValueError, match="exists already, from package fake"):
        sagellm.register_function(len, "fake_keep")


def test_two_packages_of_one_name_are_refused(package: Path) -> None:
    other = package / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[sagellm.functions]\nfake_keep = builtins:bool\n")
    (told,) = mistakes(("function: f", "function: fake_keep"))
    assert "is offered by package fake and package other" in told


class NoMethods:
    async def on_item(self, ctx: Any, item: Any) -> None: ...


def broken(options: Any, setup: Any) -> Any:
    return 1 // 0


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda *_: None, "guard: build returned None, which has no initial, on"),
        (lambda *_: NoMethods(), "has no concurrency, holds, capacity, on_events, on_signal, "),
        (broken, r"guard: build raised ZeroDivisionError: .* \(.*test_extensions\.py:\d+\)"),
    ],
)
def test_an_operator_that_cannot_be_built_is_a_mistake(build: Any, says: str) -> None:
    port = (Port("in", "request"),), (Port("out", "request"),)
    sagellm.register_operator(OpSpec("guard", *port), build)
    (told,) = mistakes(("op: filter, function: f", "op: guard"))
    assert re.search(says, told)


def test_a_policy_that_cannot_be_built_is_a_mistake() -> None:
    sagellm.register_function(lambda request: True, "f")
    sagellm.register_policy("torn", lambda options: 1 // 0)  # type: ignore[arg-type,return-value]
    (told,) = mistakes(("fifo", "torn"))
    assert "build raised ZeroDivisionError" in told
