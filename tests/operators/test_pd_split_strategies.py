"""The strategies ratio and adaptive of pd_split, by hand-worked cases."""

from typing import Any

import pytest

from sagellm.operators.pd_split import PDSplitOptions, build
from sagellm.runtime.feedback import (
    FirstToken,
    HealthChanged,
    KVMoved,
    LoadReported,
    Topology,
)
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Setup, Signal, Target
from sagellm.runtime.port import EngineFacts, EngineLoad
from sagellm.runtime.sampling import Sampling

APART, TOGETHER = frozenset({"disaggregated"}), frozenset({"aggregated"})
SHARED = (
    Target("prefill", 1, "p", True, APART, op="prefill"),
    Target("decode", 1, "d", False, APART, op="decode"),
    Target("generate", 1, "d", True, TOGETHER, op="generate"),
)
THREE = (*SHARED[:2], Target("generate", 1, "g", True, TOGETHER, op="generate"))
ADAPTIVE = PDSplitOptions(strategy="adaptive", min_uncached_tokens=1000)


def way(split: Any, name: str, num_tokens: int, max_tokens: int = 10) -> str:
    sampling = Sampling(max_tokens=max_tokens)
    request = Request(request_id=name, prompt_token_ids=(1,) * num_tokens, sampling=sampling)
    (emit,) = split(Arrival(request))
    split(Signal("forget", name))
    return str(emit.outlet)


def measured(split: Any, node: str, seconds: float, num_tokens: int = 100) -> None:
    for scale in (1, 2, 3, 4):
        first = FirstToken(
            node=node,
            seconds=9.0,
            num_computed_tokens=scale * num_tokens,
            computed_s=scale * seconds,
        )
        split(first)


def runs(split: Any, node: str, number: int, step_s: float = 0.01) -> None:
    """The load of an engine that has just run ten steps."""
    for num_steps in (10, 20):
        load = EngineLoad(num_running=number, num_steps=num_steps)
        split(LoadReported(node=node, load=load), num_steps * step_s)


@pytest.fixture
def split(running: Any) -> Any:
    """Prefills of 1 ms a token on both ways, and transfers of 0.1 ms a token."""
    made = running(build(ADAPTIVE, Setup("split", targets=SHARED)))
    measured(made, "decode", 0.1)
    measured(made, "generate", 0.1)
    made(KVMoved(num_tokens=1000, seconds=0.1))
    return made


def test_nothing_is_gained_where_nothing_decodes(split: Any) -> None:
    assert way(split, "r", 5000) == "aggregated"


def test_a_prefill_beside_others_delays_them(split: Any) -> None:
    """One sequence loses 0.5 s to a prompt of 500 tokens, whose blocks move in 0.05 s."""
    runs(split, "decode", 1)
    assert way(split, "r", 500) == "disaggregated"


def test_a_transfer_that_takes_longer_than_the_gain_is_not_worth_it(split: Any) -> None:
    runs(split, "decode", 1)
    for _ in range(200):
        split(KVMoved(num_tokens=1000, seconds=2.0))
    assert way(split, "r", 500) == "aggregated"
    runs(split, "decode", 3)  # 3 * 0.5 s are more than the 1.0 s of the transfer
    assert way(split, "s", 500) == "disaggregated"


def test_prompts_that_wait_on_a_way_count_there(split: Any) -> None:
    """Each prompt stays where it was sent until its first token."""
    runs(split, "generate", 1)
    sampling = Sampling(max_tokens=10)
    sent = []
    for number in range(4):
        request = Request(request_id=f"r{number}", prompt_token_ids=(1,) * 100, sampling=sampling)
        (emit,) = split(Arrival(request))
        sent.append(emit.outlet)
    # Wait at p: 0, then 0.1 s, which is the delay of the other sequence: the transfer decides.
    assert sent == ["disaggregated", "aggregated", "disaggregated", "aggregated"]
    split(FirstToken(node="decode", seconds=1.0, request_id="r0"))
    split(FirstToken(node="decode", seconds=1.0, request_id="r2"))
    assert way(split, "s", 100) == "disaggregated"
    pending = split.state.forecast.pending
    assert set(pending) == {"r1", "r3"}
    assert split.operator.keeps(split.state, "r1")
    assert not split.operator.keeps(split.state, "r0")


def test_choices_of_a_request_count_each(split: Any) -> None:
    runs(split, "generate", 9)
    request = Request(request_id="r", prompt_token_ids=(1,) * 100, sampling=Sampling(n=2))
    split(Arrival(request))
    split(Arrival(request))
    side = split.state.forecast.sides["disaggregated"]
    assert (side.num_pending, side.num_pending_tokens) == (2, 200)
    split(Signal("forget", "r"))
    side = split.state.forecast.sides["disaggregated"]
    assert (side.num_pending, side.num_pending_tokens) == (0, 0)


def test_more_prefill_replicas_wait_less(split: Any) -> None:
    runs(split, "generate", 1)
    split(Topology(1, {"p": 4, "d": 1}))
    sampling, sent = Sampling(max_tokens=10), []
    for number in range(4):
        request = Request(request_id=f"r{number}", prompt_token_ids=(1,) * 100, sampling=sampling)
        (emit,) = split(Arrival(request))
        sent.append(emit.outlet)
    assert sent == ["disaggregated"] * 4
    for replica in (1, 2, 3):
        split(HealthChanged(node="prefill", replica=replica, is_up=False))
    assert way(split, "s", 100) == "aggregated"


def test_the_time_of_a_token_counts_where_answers_have_engines_of_their_own(running: Any) -> None:
    def split_with(step_s: float) -> Any:
        made = running(build(ADAPTIVE, Setup("split", targets=THREE)))
        measured(made, "decode", 0.1)
        measured(made, "generate", 0.1)
        made(KVMoved(num_tokens=1000, seconds=1.0))
        runs(made, "decode", 1, step_s)
        runs(made, "generate", 0, 0.02)
        load = EngineLoad(num_running=1, num_steps=30)
        made(LoadReported(node="generate", load=load), 0.5)
        load = EngineLoad(num_running=0, num_steps=40)
        made(LoadReported(node="generate", load=load), 0.7)
        return made

    # 10 tokens of 10 ms less are 0.1 s, the transfer of 100 tokens takes as long; 40 take 0.4 s.
    assert way(split_with(0.01), "r", 99, 40) == "disaggregated"
    assert way(split_with(0.01), "r", 101, 5) == "aggregated"
    assert way(split_with(0.03), "r", 99, 40) == "aggregated"


def test_until_enough_was_measured_the_threshold_decides(running: Any) -> None:
    split = running(build(ADAPTIVE, Setup("split", targets=SHARED)))
    runs(split, "decode", 5)
    assert [way(split, "r", n) for n in (999, 1000)] == ["aggregated", "disaggregated"]
    measured(split, "decode", 0.1)
    assert way(split, "r", 500) == "disaggregated"  # by the prefills of the one measured way


def test_a_given_bandwidth_counts_until_a_transfer_was_measured(running: Any) -> None:
    facts = {"p": EngineFacts("m", 4096, 8, block_size=16, kv_block_bytes=16_000)}
    options = PDSplitOptions(strategy="adaptive", kv_bytes_per_s=1e6)  # 1 ms a token
    split = running(build(options, Setup("split", targets=SHARED, facts=facts)))
    measured(split, "decode", 0.05)
    runs(split, "decode", 1)
    assert way(split, "r", 500) == "aggregated"
    split(KVMoved(num_tokens=1000, seconds=0.1))
    assert way(split, "r", 500) == "disaggregated"


def test_without_a_prefill_replica_all_are_aggregated(split: Any) -> None:
    runs(split, "decode", 5)
    split(HealthChanged(node="prefill", replica=0, is_up=False))
    assert way(split, "r", 500) == "aggregated"


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "given", "expected"),
    [
        (40, 10, None, "disaggregated"),
        (39, 10, None, "aggregated"),
        (4, 1, None, "disaggregated"),  # no threshold of tokens
        (20, 10, 2.0, "disaggregated"),
    ],
)
def test_the_ratio_alone_decides(
    running: Any, num_tokens: int, max_tokens: int, given: Any, expected: str
) -> None:
    options = PDSplitOptions(strategy="ratio", min_prompt_ratio=given)
    split = running(build(options, Setup("split", targets=SHARED)))
    assert way(split, "r", num_tokens, max_tokens) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "ratio", "min_uncached_tokens": 9}, "ratio does not use min_uncached_tokens"),
        ({"answer_tokens": 9}, "threshold does not use answer_tokens"),
        ({"strategy": "ratio", "kv_bytes_per_s": 9.0}, "ratio does not use kv_bytes_per_s"),
        ({"strategy": "adaptive"}, "outlet aggregated leads to no engine"),
    ],
)
def test_an_option_without_effect_is_refused(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(PDSplitOptions(**options), Setup("split"))


def test_only_adaptive_subscribes_to_measurements() -> None:
    plain = build(PDSplitOptions(), Setup("split", targets=SHARED)).subscribes
    assert plain == {"health", "topology", "cache"}
    ratio = build(PDSplitOptions(strategy="ratio"), Setup("split", targets=SHARED)).subscribes
    assert ratio == {"health", "topology"}
    adaptive = build(ADAPTIVE, Setup("split", targets=SHARED)).subscribes
    assert adaptive == plain | {"first_token", "load", "transfer"}
