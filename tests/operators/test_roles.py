"""roles: which replicas compute prompts, and when a replica changes its role."""

from itertools import pairwise
from typing import Any

import pytest

from sagellm.operators.roles import RolesOptions, build
from sagellm.runtime.feedback import CreditChanged, HealthChanged, LoadReported, RoleAssigned
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Emit, Report, Setup, Target
from sagellm.runtime.port import EngineLoad

OUT = frozenset({"out"})
TARGETS = (
    Target("prefill", 4, "g", True, OUT, op="prefill"),
    Target("decode", 4, "g", False, OUT, op="decode"),
)
OPTIONS = RolesOptions(interval_s=1.0, max_decode_seqs=10)


def assigned(outputs: Any) -> list[tuple[str, int, bool]]:
    found = [one.feedback for one in outputs if isinstance(one, Report)]
    assert all(isinstance(one, RoleAssigned) for one in found)
    return [(one.operator, one.number, one.is_on) for one in found]


@pytest.fixture
def roles(running: Any) -> Any:
    made = running(build(OPTIONS, Setup("roles", targets=TARGETS)))
    for node in ("prefill", "decode"):
        for number in range(4):
            made(CreditChanged(node=node, replica=number, num_left=8.0))
    return made


def report(roles: Any, node: str, number: int, now: float, **load: int) -> list[Any]:
    return assigned(roles(LoadReported(node=node, replica=number, load=EngineLoad(**load)), now))


def busy(roles: Any, until_s: int, *, prefill: int, decode: int, since_s: int = 0) -> list[Any]:
    """A report of each replica each second: requests there, by the role of the replica."""
    found = []
    for now in range(since_s, until_s):
        for number, role in sorted(roles.state.roles.items()):
            load = prefill if role == "prefill" else decode
            found += report(roles, role, number, float(now), num_running=load)
    return found


def test_each_replica_takes_requests_of_its_role_only(running: Any) -> None:
    made = running(build(OPTIONS, Setup("roles", targets=TARGETS)))
    found = []
    for node in ("prefill", "decode"):
        for number in range(4):
            found += assigned(made(CreditChanged(node=node, replica=number, num_left=8.0)))
    closed = [("prefill", 2), ("prefill", 3), ("decode", 0), ("decode", 1)]
    assert found == [(node, number, False) for node, number in closed]


def test_requests_pass_unchanged(roles: Any) -> None:
    request = Request(request_id="r")
    assert roles(Arrival(request)) == (Emit(request),)


def test_balanced_loads_change_nothing(roles: Any) -> None:
    assert busy(roles, 50, prefill=0, decode=5) == []
    assert busy(roles, 100, prefill=1, decode=9, since_s=50) == []  # both are nearly full


def test_a_replica_goes_to_the_role_that_is_full_when_it_has_served_what_it_had(
    roles: Any,
) -> None:
    found = busy(roles, 20, prefill=1, decode=1)
    assert found == [("decode", 2, False)]  # it still decodes
    assert roles.state.draining == 2
    assert report(roles, "decode", 2, 21.0, num_running=0) == [("prefill", 2, True)]
    assert sorted(roles.state.roles.items())[2] == (2, "prefill")


def test_the_least_busy_replica_changes(roles: Any) -> None:
    for now in range(20):
        found = []
        for number, load in ((0, 1), (1, 1), (2, 3), (3, 1)):
            node = "prefill" if number < 2 else "decode"
            found += report(roles, node, number, float(now), num_running=load)
        if found:
            break
    assert found == [("decode", 3, False)]


def test_the_last_replica_of_a_role_stays(running: Any) -> None:
    targets = tuple(Target(one.node, 2, "g", one.is_next, OUT, op=one.op) for one in TARGETS)
    made = running(build(OPTIONS, Setup("roles", targets=targets)))
    for node in ("prefill", "decode"):
        for number in range(2):
            made(CreditChanged(node=node, replica=number, num_left=8.0))
    assert busy(made, 60, prefill=1, decode=0) == []


def changes(roles: Any, seconds: int) -> list[int]:
    """When roles change, if each role looks idle as soon as the other one is full."""
    found = []
    for now in range(seconds):
        num_prefill = sum(role == "prefill" for role in roles.state.roles.values())
        prefill, decode = (1, 1) if num_prefill < 3 else (0, 10)
        for number, role in sorted(roles.state.roles.items()):
            load = prefill if role == "prefill" else decode
            if number == roles.state.draining:
                load = 0
            if any(is_on for *_, is_on in report(roles, role, number, now, num_running=load)):
                found.append(now)
    return found


def test_changes_back_and_forth_become_rare(roles: Any) -> None:
    times = changes(roles, 300)
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps[0] < 10
    assert all(gap > 30 for gap in gaps[5:])  # at most one in 32 intervals


def test_a_replica_that_is_lost_while_it_drains_has_its_new_role(roles: Any) -> None:
    busy(roles, 20, prefill=1, decode=1)
    assert roles(HealthChanged(node="decode", replica=2, is_up=False), 20.0) == ()
    found = assigned(roles(HealthChanged(node="prefill", replica=2, is_up=False), 20.0))
    assert found == [("prefill", 2, True)]
    assert roles.state.draining is None


def test_too_few_replicas_have_both_roles(running: Any) -> None:
    targets = tuple(Target(one.node, 1, "g", one.is_next, OUT, op=one.op) for one in TARGETS)
    made = running(build(OPTIONS, Setup("roles", targets=targets)))
    assert made(CreditChanged(node="decode", replica=0, num_left=8.0)) == ()


def test_an_engine_must_have_both_roles() -> None:
    targets = (TARGETS[0], Target("decode", 4, "d", False, OUT, op="decode"))
    with pytest.raises(ValueError, match="name one engine in both"):
        build(OPTIONS, Setup("roles", targets=targets))
