"""A policy of your own against the ones that ship, on the same simulated overload."""

from sagellm import Graph, Request, ops, register_policy
from sagellm.load.synthetic import parse_synthetic
from sagellm.operators.policies import Policy, PolicySortOptions, QueueOrder
from sagellm.simulation.figures import summarise
from sagellm.simulation.simulation_run import SimulationPoint, simulate

LOAD = "synthetic:rate=9,requests=800,input=lognormal:600:1,output=exponential:80,slo_ttft_s=2"


def work(request: Request) -> float:
    """The rank of a waiting request: the least work goes first, and an old request before."""
    return request.stamps.arrived_s + 0.02 * request.num_uncached_tokens


def least_work(options: PolicySortOptions) -> Policy:
    return Policy((QueueOrder(work),))


def attainment(policy: str) -> float:
    """The share of requests whose first token comes within two seconds."""
    graph = Graph("simulated").engine(
        "g", kind="modelled", model="null", max_num_seqs=16, prefill_token_s=1e-4
    )
    graph >> ops.policy_sort(policy) >> ops.generate(engine="g")
    run = simulate(SimulationPoint(graph.document, list(parse_synthetic(LOAD).generate())))
    return summarise(run, None, {}).slo_attainment or 0.0


if __name__ == "__main__":
    register_policy("least_work", least_work)
    for policy in ("fifo", "slo_aware", "cost_optimized", "least_work"):
        print(f"{policy:16}{attainment(policy):6.1%} in time")
