"""A policy of your own: the shortest answer first."""

import trio

from sagellm import Graph, Request, Sampling, ops, register_policy
from sagellm.operators.policies import Policy, PolicySortOptions, QueueOrder


def answer_len(request: Request) -> float:
    """The rank of a waiting request: the lowest goes first."""
    return float(request.sampling.max_tokens)


def shortest_first(options: PolicySortOptions) -> Policy:
    return Policy((QueueOrder(answer_len),))


async def main() -> None:
    graph = Graph("short").engine("g", model="sage-tiny", max_num_seqs=1)
    graph >> ops.policy_sort("shortest_first") >> ops.generate(engine="g")
    finished = []
    async with graph.open() as session, trio.open_nursery() as nursery:

        async def ask(max_tokens: int) -> None:
            sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
            await session.generate("def", sampling=sampling)
            finished.append(max_tokens)

        for max_tokens in (16, 12, 8, 4):
            nursery.start_soon(ask, max_tokens)
            await trio.lowlevel.checkpoint()
    print("finished in this order:", finished)


if __name__ == "__main__":
    register_policy("shortest_first", shortest_first)
    trio.run(main)
