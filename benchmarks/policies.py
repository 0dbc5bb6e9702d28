"""Policies and admission in simulated overload: what each meets, refuses and costs.

`python -m benchmarks.policies` prints the tables of docs/policies.md and docs/admission.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from msgspec.structs import replace

from sagellm import Graph, ops
from sagellm.graphs.text.yaml import load
from sagellm.load.synthetic import parse_synthetic
from sagellm.runtime.messages import PRIORITIES
from sagellm.simulation.simulation_run import SimulatedRequest, SimulationPoint, simulate

POLICIES = (
    "fifo",
    "priority",
    "slo_aware",
    "least_slack",
    "cost_optimized",
    "weighted_shortest_prefill",
    "adaptive",
)
LENGTHS = {
    "different": "input=lognormal:1000:1,output=lognormal:100:0.7",
    "alike": "input=lognormal:1000:0.2,output=exponential:100",
}
ROLES = Path(__file__).parent / "simulation" / "roles.yaml"
LONG_PREFILL = Path(__file__).parent / "simulation" / "long_prefill.yaml"
CAPACITY = 6.0  # requests a second of these lengths
CALM_S = 10.0  # at the capacity, before an overload: then admission knows how fast requests leave
PRICE = 2.0  # of an hour of a replica
CRITICAL, BACKGROUND = PRIORITIES["critical"], PRIORITIES["background"]


def graph(policy: str = "slo_aware", **admission: Any) -> Graph:
    """One replica of 32 sequences, behind an admission if it has options."""
    made = Graph("one").engine(
        "g",
        kind="modelled",
        model="null",
        max_num_seqs=32,
        max_model_len=16384,
        num_blocks=8192,
        prefill_token_s=1e-4,
        decode_step_s=0.01,
        decode_row_s=2e-4,
    )
    if admission:
        made = made >> ops.admission(**admission)
    return made >> ops.policy_sort(policy) >> ops.generate(engine="g")


def played(made: Graph, *workloads: str) -> Sequence[SimulatedRequest]:
    """The requests of synthetic workloads after their simulation. One workload after the other: a
    workload begins CALM_S seconds after the one before.
    """
    planned = [
        replace(one, at_s=one.at_s + CALM_S * number)
        for number, workload in enumerate(workloads)
        for one in parse_synthetic(workload).generate()
    ]
    return simulate(SimulationPoint(made.document, planned)).requests


def is_good(request: SimulatedRequest) -> bool:
    """Whether a request was served, and its first token came in time."""
    ttft_s, objective_s = request.ttft_s, request.slo_ttft_s
    return request.is_ok and ttft_s is not None and ttft_s <= (objective_s or float("inf"))


def attained(requests: Sequence[SimulatedRequest]) -> float:
    """The share of the requests that are in time."""
    return sum(map(is_good, requests)) / len(requests)


# ---- orders --------------------------------------------------------------------------------------


def attainments(
    lengths: str, slo_ttft_s: float, rate: float, *, number: int = 700, seed: int = 0
) -> dict[str, float]:
    """The share of requests that each policy serves in time."""
    workload = f"rate={rate},requests={number},seed={seed},slo_ttft_s={slo_ttft_s}"
    text = f"{workload},{LENGTHS[lengths]}"
    return {policy: attained(played(graph(policy), text)) for policy in POLICIES}


@dataclass(frozen=True)
class Price:
    """The cost of a policy at the highest rate at which it serves a share of the value in time.

    `per_value`: of a thousand units of `cost_budget` that were served in time, for the hours in
    which requests arrive.
    """

    rate: float
    attained: float
    per_value: float


def budget(request: SimulatedRequest) -> float:
    return 1.0 if request.cost_budget is None else request.cost_budget


def price(policy: str, share: float, rates: Sequence[float], *, number: int = 700) -> Price:
    """The cost at equal attainment: `share` of the value of all requests is served in time.

    The requests have values from 0.2 to 5, whatever their lengths.
    """
    found = Price(0.0, 0.0, float("inf"))
    for rate in rates:
        workload = f"rate={rate},requests={number},slo_ttft_s=4,budgets=0.2:1+1:1+5:1"
        requests = played(graph(policy), f"{workload},{LENGTHS['different']}")
        good = sum(budget(one) for one in requests if is_good(one))
        attainment = good / sum(map(budget, requests))
        if attainment < share:
            break
        hours = requests[-1].arrived_s / 3600
        found = Price(rate, attainment, 1e3 * hours * PRICE / good)
    return found


# ---- admission -----------------------------------------------------------------------------------


def goodput(requests: Sequence[SimulatedRequest], seconds: float) -> float:
    """Tokens a second of the requests that are in time."""
    return sum(one.num_tokens for one in requests if is_good(one)) / seconds


def overload(factors: Sequence[float], *, seconds: float = 60.0, **admission: Any) -> list[float]:
    """The goodput at multiples of the capacity, after some time at the capacity."""
    options = {"slo_ttft_s": 2.0, "max_queued": 200, **admission}
    text = f"slo_ttft_s=2,{LENGTHS['different']}"
    found = []
    for factor in factors:
        calm = f"rate={CAPACITY},seconds={CALM_S},{text}"
        busy = f"rate={factor * CAPACITY},seconds={seconds},seed=1,{text}"
        requests = played(graph(**options), calm, busy)
        found.append(goodput([one for one in requests if one.arrived_s >= CALM_S], seconds))
    return found


@dataclass(frozen=True)
class Shedding:
    """The requests of two classes at 3 times the capacity: accepted and refused.

    `num_out_of_turn`: background requests that were accepted while critical ones were refused:
    between two such refusals that are at most two seconds apart.
    """

    accepted: Mapping[int, int]
    refused: Mapping[int, int]
    num_out_of_turn: int


def shedding(*, seconds: float = 60.0, seed: int = 1, **admission: Any) -> Shedding:
    """Critical and background requests, half each, at 3 times the capacity."""
    options = {"slo_ttft_s": 4.0, "max_queued": 200, **admission}
    text = f"slo_ttft_s=4,priorities=critical:1+background:1,{LENGTHS['alike']}"
    calm = f"rate={CAPACITY},seconds={CALM_S},{text}"
    busy = f"rate={3 * CAPACITY},seconds={seconds},seed={seed},{text}"
    requests = [one for one in played(graph(**options), calm, busy) if one.arrived_s >= CALM_S]
    refused_s = [one.arrived_s for one in requests if one.code and one.priority == CRITICAL]
    out_of_turn = [
        one
        for one in requests
        if one.priority == BACKGROUND
        and not one.code
        and any(a < one.arrived_s < b <= a + 2 for a, b in pairwise(refused_s))
    ]

    def count(*, is_refused: bool) -> dict[int, int]:
        chosen = [one.priority for one in requests if bool(one.code) == is_refused]
        return {level: chosen.count(level) for level in (CRITICAL, BACKGROUND)}

    return Shedding(count(is_refused=False), count(is_refused=True), len(out_of_turn))


# ---- the load at the end of a prefill ------------------------------------------------------------


@dataclass(frozen=True)
class DecodeSwing:
    """The sequences that decode, each second: mean, least and most; and the requests whose tokens
    came within 50 ms each, of all that were served.
    """

    mean: float
    least: int
    most: int
    num_good: int
    num_served: int


def swing(load_at: str, *, seconds: int = 200) -> DecodeSwing:
    """Twice the load that decoding can take within its TPOT objective, behind prefills of 4 s."""
    text = f"rate=6,seconds={seconds},input=lognormal:8000:0.2,output=lognormal:200:0.4"
    document = load(LONG_PREFILL.read_text(), file=str(LONG_PREFILL))
    planned = list(parse_synthetic(text).generate())
    run = simulate(SimulationPoint(document, planned, {"admission.load_at": load_at}))
    served = [(one.first_s, one.ended_s, one.tpot_s or 0.0) for one in run.requests if one.is_ok]
    counts = [
        sum(first_s is not None and first_s <= second < end_s for first_s, end_s, _ in served)
        for second in range(seconds // 4, seconds)
    ]
    num_good = sum(tpot_s <= 0.05 for _, _, tpot_s in served)
    return DecodeSwing(fmean(counts), min(counts), max(counts), num_good, len(served))


# ---- roles ---------------------------------------------------------------------------------------

PROMPTS = "rate=15,seconds=120,input=lognormal:6000:0.5,output=exponential:40"
ANSWERS = "rate=22,seconds=120,seed=2,input=lognormal:300:0.5,output=exponential:900"


def flipped(**overrides: Any) -> float:
    """The share of requests with a first token within 2 s and 30 ms a token: two minutes of long
    prompts, two of long answers, and two of long prompts again. `overrides`: options of `roles`.
    """
    planned = [
        replace(one, at_s=one.at_s + 120.0 * number)
        for number, text in enumerate((PROMPTS, ANSWERS, f"{PROMPTS},seed=3"))
        for one in parse_synthetic(text).generate()
    ]
    document = load(ROLES.read_text(), file=str(ROLES))
    options = {f"roles.{name}": value for name, value in overrides.items()}
    served = simulate(SimulationPoint(document, planned, options)).requests
    good = [
        one
        for one in served
        if one.is_ok and (one.ttft_s or 0.0) <= 2.0 and (one.tpot_s or 0.0) <= 0.03
    ]
    return len(good) / len(served)


# ---- the tables ----------------------------------------------------------------------------------


def show_orders() -> None:
    for lengths in LENGTHS:
        for slo_ttft_s in (1.0, 4.0):
            for rate in (4, 6, 7, 8, 10, 14):
                found = attainments(lengths, slo_ttft_s, rate)
                shares = "  ".join(f"{name} {value:.1%}" for name, value in found.items())
                part = found["adaptive"] / max(found.values())
                print(
                    f"{lengths}, {slo_ttft_s:g} s, {rate}/s: {shares}; adaptive / best {part:.3f}"
                )


def show_prices() -> None:
    rates = [4 + 0.5 * step for step in range(29)]
    for policy in POLICIES:
        found = price(policy, 0.9, rates)
        print(f"{policy}: {found.rate:g}/s, {found.attained:.1%}, {found.per_value:.4f}")


def show_overload() -> None:
    factors = (0.5, 0.8, 1.0, 1.2, 2.0, 5.0, 10.0)
    variants: dict[str, dict[str, Any]] = {"plain": {}, "adaptive": {"concurrency": "adaptive"}}
    for name, options in variants.items():
        found = overload(factors, **options)
        shares = ", ".join(f"{f:g}x {one:.0f}" for f, one in zip(factors, found, strict=True))
        print(f"{name}: {shares}; 10x / peak {found[-1] / max(found):.3f}")


if __name__ == "__main__":
    show_orders()
    show_prices()
    show_overload()
    for seed in (1, 2, 3):
        print(shedding(seed=seed))
    for load_at in ("arrival", "prefill_end"):
        print(load_at, swing(load_at))
    print(f"roles that follow the load: {flipped():.1%}")
    for number in (2, 3, 4):
        print(f"{number} + {6 - number}: {flipped(prefill_replicas=number, high=1000.0):.1%}")
