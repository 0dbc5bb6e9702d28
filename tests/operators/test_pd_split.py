from typing import Any

import pytest

from sagellm.operators.pd_split import PDSplitOptions, build
from sagellm.runtime.feedback import HealthChanged, Topology
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Setup, Signal, Target
from sagellm.runtime.sampling import Sampling


def outlet(running: Any, options: Any, **fields: Any) -> Any:
    (emit,) = running(build(options, Setup("split")))(Arrival(Request(request_id="r", **fields)))
    return emit.outlet


@pytest.mark.parametrize(("length", "expected"), [(31, "aggregated"), (32, "disaggregated")])
def test_the_threshold_itself_is_disaggregated(running: Any, length: int, expected: Any) -> None:
    assert outlet(running, PDSplitOptions(), prompt_token_ids=(1,) * length) == expected


def test_cached_tokens_do_not_count_and_emitted_ones_do(running: Any) -> None:
    long = (1,) * 40
    assert (
        outlet(running, PDSplitOptions(), prompt_token_ids=long, num_cached_tokens=9)
        == "aggregated"
    )
    resumed = {"prompt_token_ids": (1,) * 30, "emitted_token_ids": (2, 2)}
    assert outlet(running, PDSplitOptions(), **resumed) == "disaggregated"


def test_zero_disaggregates_everything(running: Any) -> None:
    assert outlet(running, PDSplitOptions(min_uncached_tokens=0)) == "disaggregated"


@pytest.mark.parametrize(("max_tokens", "expected"), [(10, "disaggregated"), (11, "aggregated")])
def test_the_ratio_of_prompt_to_answer_counts_if_given(
    running: Any, max_tokens: int, expected: Any
) -> None:
    options = PDSplitOptions(min_prompt_ratio=4.0)
    sampling = Sampling(max_tokens=max_tokens)
    assert outlet(running, options, prompt_token_ids=(1,) * 40, sampling=sampling) == expected


def test_the_item_is_not_changed(running: Any) -> None:
    request = Request(request_id="r")
    split = running(build(PDSplitOptions(), Setup("split")))
    assert split(Arrival(request))[0].item is request
    assert split(Signal("cancel", "r")) == ()


def test_long_prompts_are_aggregated_while_no_prefill_replica_is_up(running: Any) -> None:
    apart, aggregated = frozenset({"disaggregated"}), frozenset({"aggregated"})
    targets = (
        Target("prefill", 2, "p", True, apart),
        Target("decode", 1, "d", False, apart),
        Target("generate", 1, "d", True, aggregated),
    )
    split = running(build(PDSplitOptions(), Setup("split", targets=targets)))

    def way() -> str:
        (emit,) = split(Arrival(Request(request_id="r", prompt_token_ids=(1,) * 99)))
        return str(emit.outlet)

    for replica in range(2):
        assert way() == "disaggregated"
        split(HealthChanged(node="prefill", replica=replica, is_up=False))
    assert way() == "aggregated"
    split(Topology(1, {"p": 3, "d": 1}))  # the third one is up
    assert way() == "disaggregated"
    split(HealthChanged(node="prefill", replica=2, is_up=False))
    assert way() == "aggregated"
    split(HealthChanged(node="prefill", replica=1, is_up=True))
    split(
        HealthChanged(node="decode", replica=0, is_up=False)
    )  # the aggregated engine is lost with it
    assert way() == "disaggregated"
