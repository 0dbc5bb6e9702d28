"""Four scenarios on simulated devices: a batch, a tight objective, mixed priorities, a budget.

With a folder as argument, it draws a picture of each. Devices are the roofline of an H100.
"""

import sys
from pathlib import Path

from sagellm import Graph, ops
from sagellm.load.report import Objective
from sagellm.load.synthetic import parse_synthetic
from sagellm.simulation.figures import SimulationSummary, latency, summarise
from sagellm.simulation.simulation_run import SimulatedRun, SimulationPoint, simulate

DEVICE = {
    "kind": "modelled",
    "model": "llama-3-8b",
    "profile": "h100-sxm",
    "kv_memory": "50GiB",
    "max_model_len": 16384,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 128,
}
PRICE = 3.0  # of a device's hour
PICTURES = Path(sys.argv[1]) if len(sys.argv) > 1 else None


def alike(num_devices: int, policy: str = "fifo", **options: int) -> Graph:
    """A graph of devices that compute prompts and answers in the same steps."""
    graph = Graph("alike").engine("g", **{**DEVICE, **options}, replicas=num_devices)
    graph >> ops.policy_sort(policy) >> ops.route() >> ops.generate(engine="g")
    return graph


def split(num_prefill: int, num_decode: int) -> Graph:
    """A graph in which prompts and answers have devices of their own."""
    graph = Graph("split").engine("p", **DEVICE, replicas=num_prefill)
    graph.engine("d", **DEVICE, replicas=num_decode)
    transfer = ops.kv_transfer(max_inflight=32)
    graph >> ops.policy_sort("fifo") >> ops.route() >> ops.prefill(engine="p")
    graph >> transfer >> ops.decode(engine="d")
    return graph


def run(graph: Graph, workload: str, name: str) -> SimulatedRun:
    requests = list(parse_synthetic(f"synthetic:{workload}").generate())
    found = simulate(SimulationPoint(graph.document, requests))
    if PICTURES is not None:
        from sagellm.simulation.pictures import plot_run  # needs matplotlib

        PICTURES.mkdir(exist_ok=True)
        plot_run(PICTURES / f"{name.replace(' ', '-')}.png", found.requests, None)
    return found


def figures(found: SimulatedRun, objective: Objective | None = None) -> SimulationSummary:
    return summarise(found, objective, dict.fromkeys(found.engines, PRICE))


def offline_batch() -> None:
    """Requests that are all there at once: more devices end them sooner, and the last answers keep
    all of them busy.
    """
    batch = "rate=100000,requests=2000,input=lognormal:1000:0.8,output=exponential:200"
    for devices in (1, 2, 4):
        found = figures(run(alike(devices), batch, f"batch-{devices}"))
        each = found.cost_per_1k_tokens or 0.0
        print(
            f"batch, {devices} devices: {found.elapsed_s:.0f} s, {each * 1e3:.2f} a million tokens"
        )


def tight_objective() -> None:
    """12 ms a token: a split keeps long prompts away from answers. So do small steps."""
    objective = Objective(ttft_s=2.0, itl_s=0.012)
    load = "rate=14,requests=600,input=lognormal:6000:0.5,output=exponential:150"
    graphs = {
        "4 alike": alike(4),
        "2 + 2": split(2, 2),
        "4 alike with small steps": alike(4, max_num_batched_tokens=384),
    }
    for name, graph in graphs.items():
        found = figures(run(graph, load, f"objective-{name}"), objective)
        print(f"objective, {name}: {found.slo_attainment:.0%} in time")


def mixed_priorities() -> None:
    """Critical requests beside others, on one device with too much to do."""
    load = (
        "rate=45,requests=900,input=lognormal:1500:0.8,output=exponential:200,"
        "priorities=critical:1+background:3"
    )
    for policy in ("fifo", "priority"):
        found = run(alike(1, policy), load, f"priorities-{policy}")
        critical = latency(one.ttft_s for one in found.requests if one.priority == 0)
        others = latency(one.ttft_s for one in found.requests if one.priority != 0)
        assert critical is not None
        assert others is not None
        print(
            f"priorities, {policy}: first token of critical requests {critical.p50 / 1e3:.1f} s, "
            f"of others {others.p50 / 1e3:.1f} s"
        )


def cost_budget() -> None:
    """The fewest devices with which 95 of 100 requests are in time."""
    objective = Objective(ttft_s=0.5, itl_s=0.02)
    load = "rate=40,requests=1200,input=lognormal:1200:0.8,output=exponential:200"
    for devices in range(1, 9):
        found = figures(run(alike(devices), load, f"budget-{devices}"), objective)
        if (found.slo_attainment or 0.0) >= 0.95:
            print(f"budget: {devices} devices, {devices * PRICE:.0f} an hour")
            return


if __name__ == "__main__":
    offline_batch()
    tight_objective()
    mixed_priorities()
    cost_budget()
