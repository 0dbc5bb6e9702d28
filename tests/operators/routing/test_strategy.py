"""What a strategy may be: a function, or a dataclass with options and a state."""

from dataclasses import dataclass, field
from typing import Any

import pytest

import sagellm
from sagellm.graphs.diagnostics import GraphError
from sagellm.operators import route as route_module
from sagellm.operators.route import RouteOptions, build
from sagellm.operators.routing import STRATEGIES, Candidates
from sagellm.operators.routing.strategy import check_strategy
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Draw, Setup, Target
from sagellm.runtime.user_code import WrongResult

SETUP = Setup("route", (Target("generate", 3, "g", is_next=True),))


@dataclass(frozen=True)
class InBursts:
    """A burst of requests to one replica, then a burst to the next."""

    length: int = field(default=2, metadata={"min": 1})

    @property
    def initial(self) -> int:
        return 0

    def order(
        self, num_sent: int, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[int, int]:
        numbers = candidates.numbers
        return numbers[num_sent // self.length % len(numbers)], num_sent + 1


@pytest.fixture(autouse=True)
def in_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES._registered, "in_bursts", (InBursts, "in a test"))


def place(router: Any, number: int) -> int:
    request = Request(request_id=str(number), prompt_token_ids=(1,))
    (output,) = router(Arrival(request))
    placed, router.state = next(iter(output.choices))
    replica: int = placed.placement["generate"]
    return replica


def test_a_strategy_has_a_state_and_options(running: Any) -> None:
    router = running(build(RouteOptions("in_bursts", {"length": 3}), SETUP))
    assert [place(router, number) for number in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_its_state_stays_where_nothing_was_sent(running: Any) -> None:
    router = running(build(RouteOptions("in_bursts"), SETUP))
    before = router.state
    for number in range(4):
        router.state = before
        assert place(router, number) == 0


@pytest.mark.parametrize(
    ("strategy", "options", "says"),
    [
        ("in_bursts", {"lenght": 3}, "did you mean `length`?"),
        ("in_bursts", {"length": "3"}, "`length` must be an integer, not `3`"),
        ("in_bursts", {"length": 0}, "`length` must be at least 1, not `0`"),
        ("prefix_aware", {"min_saved": 2.0}, "must be from 0.0 to 1.0"),
        ("random", {"seed": 1}, "strategy `random` has no options of its own"),
    ],
)
def test_wrong_options_are_told_as_those_of_operators(
    strategy: str, options: Any, says: str
) -> None:
    with pytest.raises(GraphError) as caught:
        build(RouteOptions(strategy, options), SETUP)
    assert says in str(caught.value)
    assert caught.value.diagnostics[0].path[:3] == ("operators", "route", "strategy_options")


def test_a_mistake_in_a_graph_file_has_its_line(tmp_path: Any) -> None:
    text = """
sagellm: 1
name: g
engines:
  g: {model: "null", device: "null", replicas: 2}
operators:
  route:
    op: route
    strategy: prefix_aware
    strategy_options:
      max_hold: 0.5
  generate: {op: generate, engine: g}
edges:
  - source -> route -> generate -> sink
"""
    (tmp_path / "g.yaml").write_text(text)
    graph = sagellm.Graph.load(tmp_path / "g.yaml")
    with pytest.raises(GraphError) as caught, graph.open():
        pass
    assert "g.yaml:11" in str(caught.value)
    assert "has no option `max_hold`" in str(caught.value)


def test_options_of_a_strategy_can_be_set_from_outside() -> None:
    graph = sagellm.Graph("g").engine("g", model="null", device="null", replicas=2)
    graph >> sagellm.ops.route("prefix_aware") >> sagellm.ops.generate(engine="g")
    with pytest.raises(GraphError, match="`max_hold_s` must be at least"):
        graph.open(set={"route.strategy_options.max_hold_s": -1}).__enter__()


def test_only_what_a_strategy_needs_is_subscribed_to() -> None:
    assert "cache" not in build(RouteOptions(), SETUP).subscribes
    assert "cache" not in build(RouteOptions("in_bursts"), SETUP).subscribes
    assert "cache" in build(RouteOptions("prefix_aware"), SETUP).subscribes


def test_a_kind_of_feedback_that_there_is_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InBursts, "subscribes", frozenset({"cach"}), raising=False)
    with pytest.raises(ValueError, match="in_bursts subscribes to 'cach': did you mean cache"):
        build(RouteOptions("in_bursts"), SETUP)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (3, "must be a function"),
        (lambda request, pool: 0, r"\(candidates, now, draw\), and its .* are \(request, pool\)"),
        (type("Bare", (), {}), "class Bare has no initial"),
        (type("Plain", (), {"initial": 0, "order": len}), "must be a frozen dataclass"),
    ],
)
def test_what_is_no_strategy_is_refused(wrong: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        check_strategy("mine", wrong)


def test_an_answer_without_a_state_is_named(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InBursts, "order", lambda *_: 0)
    router = running(build(RouteOptions("in_bursts"), SETUP))
    with pytest.raises(WrongResult, match="a value of type int; an order and a state"):
        router(Arrival(Request(request_id="r", prompt_token_ids=(1,))))


def test_a_strategy_may_be_registered_as_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STRATEGIES, "_registered", {})
    sagellm.register_strategy("bursts", InBursts)
    assert route_module.find_strategy("bursts") is InBursts
