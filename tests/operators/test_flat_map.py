from typing import Any

import pytest

from sagellm.graphs.ir import SOURCE, Edge, Graph, Node
from sagellm.operators import policy_sort
from sagellm.operators.flat_map import FlatMapOptions, build
from sagellm.runtime.core.credit import CreditGate, Gates
from sagellm.runtime.core.effects import Send
from sagellm.runtime.core.logic_graph import LogicGraph
from sagellm.runtime.messages import Answer, Forked, Request
from sagellm.runtime.operator import Announce, Arrival, Credit, Emit, Setup
from sagellm.runtime.sampling import Sampling


def spread(running: Any, function: Any, item: Any) -> Any:
    setup = Setup(
        "fan", functions={"f": function}, encode=lambda text, model: tuple(map(ord, text))
    )
    return running(build(FlatMapOptions("f"), setup))(Arrival(item))


def test_a_request_becomes_choices_after_the_session_is_told(running: Any) -> None:
    request = Request(request_id="r", prompt="ab", user_id="u")
    announced, *emits = spread(running, lambda request: list(request.prompt), request)
    assert announced == Announce(Forked(request_id="r", num_choices=2))
    items = [emit.item for emit in emits]
    assert [item.key for item in items] == [("r", 0), ("r", 1)]
    assert [item.prompt_token_ids for item in items] == [(97,), (98,)]
    assert all(item.sampling.n == 2 and item.user_id == "u" for item in items)


def test_requests_may_be_returned_too(running: Any) -> None:
    def twice(request: Any) -> Any:
        return (request, Request(request_id="other", prompt_token_ids=(5,)))

    _, *emits = spread(running, twice, Request(request_id="r", prompt_token_ids=(1,)))
    assert [emit.item.key for emit in emits] == [("r", 0), ("r", 1)]
    assert [emit.item.prompt_token_ids for emit in emits] == [(1,), (5,)]


def test_nothing_ends_the_request(running: Any) -> None:
    (output,) = spread(running, lambda request: [], Request(request_id="r"))
    assert output.event.finish_reason == "filtered"


def test_one_of_several_choices_is_refused(running: Any) -> None:
    request = Request(request_id="r", sampling=Sampling(n=3))
    (output,) = spread(running, lambda request: ["a"], request)
    assert output.event.finish_reason == "refused"
    assert "ask for n=1" in output.event.error


def test_the_values_of_an_answer_become_its_value(running: Any) -> None:
    answer = Answer(request_id="r", text="a b")
    (emit,) = spread(running, lambda answer: answer.text.split(), answer)
    assert emit == Emit(Answer(request_id="r", text="a b", value=("a", "b")))


@pytest.mark.parametrize(
    ("result", "says"),
    [
        ("ab", "a value of type str; a list was wanted"),
        (None, "None; a list was wanted"),
        ([3], "a value of type int; a prompt or a Request was wanted"),
    ],
)
def test_a_wrong_result_fails_the_request(running: Any, result: Any, says: str) -> None:
    (output,) = spread(running, lambda item: result, Request(request_id="r"))
    assert output.event.error == f"fan: the function f returned {says}"


def test_choices_that_find_credit_at_once_are_sent_once() -> None:
    names = ("fan", "sort")
    functions = {"f": lambda request: list(request.prompt)}
    logic = {
        "fan": build(FlatMapOptions("f"), Setup("fan", functions=functions)),
        "sort": policy_sort.build(policy_sort.PolicySortOptions(), Setup("sort")),
    }
    edges = (Edge(SOURCE, "fan"), Edge("fan", "sort"), Edge("sort", "engine"))
    gates = Gates()
    gates.open(CreditGate("engine", 0), Credit(requests=2))
    logic_graph = LogicGraph(
        Graph("g", nodes=tuple(Node(name, name) for name in (*names, "engine")), edges=edges),
        logic,
        gates,
        {"engine": 1},
    )
    effects = logic_graph.send(SOURCE, Request(request_id="r", prompt="abc"), "out", 0.0)
    sent = [effect.item.choice for effect in effects if isinstance(effect, Send)]
    assert sent == [0, 1]
    assert [entry[3].choice for entry in logic_graph.cells["sort"].state.entries] == [2]
