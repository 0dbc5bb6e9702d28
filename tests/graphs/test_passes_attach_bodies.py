"""Bodies: the kernel graph of an engine inside the operators that use it."""

from sagellm.graphs.ir import Edge, Graph, Node
from sagellm.graphs.passes.placement import AttachBodies

BODY = Graph("model", "kernel", nodes=(Node("embed", "embedding"),))


def stream() -> Graph:
    route = Node("route", "route")
    nodes = [Node(name, name).with_attrs(engine=engine) for name, engine in USERS.items()]
    return Graph("g", nodes=(route, *nodes), edges=(Edge("source", "route"),))


USERS = {"prefill": "p", "decode": "d", "generate": "d"}


def test_operators_of_one_engine_share_one_body() -> None:
    after = AttachBodies({"d": BODY}).apply(stream())
    assert after.node("decode").body is after.node("generate").body is BODY


def test_an_operator_without_that_engine_stays_as_it_was() -> None:
    after = AttachBodies({"d": BODY}).apply(stream())
    assert after.node("route").body is None
    assert after.node("prefill").body is None


def test_the_lowered_graph_has_a_hash_of_its_own() -> None:
    assert AttachBodies({"d": BODY}).apply(stream()).hash != stream().hash
