"""The prefill/decode graph built in Python, with a user's function before and after the model."""

import trio

from sagellm import Answer, Graph, Request, Sampling, ops


def shout(request: Request) -> str:
    """Rewrites the prompt before the model sees it."""
    return request.prompt.upper()


def count_words(answer: Answer) -> int:
    """Makes something of the whole answer."""
    return len(answer.text.split())


def build() -> Graph:
    split = ops.pd_split(min_uncached_tokens=32)
    metrics = ops.metrics_sink()
    graph = Graph("mine").engine("p", model="sage-tiny").engine("d", model="sage-tiny")
    graph >> ops.admission() >> ops.map(shout) >> ops.policy_sort("slo_aware") >> split
    prefill = split.outlet("disaggregated") >> ops.route() >> ops.prefill(engine="p")
    prefill >> ops.kv_transfer() >> ops.decode(engine="d") >> metrics
    split.outlet("aggregated") >> ops.generate(engine="d") >> metrics
    metrics >> ops.collect() >> ops.map(count_words).named("count")
    return graph


async def main() -> None:
    async with build().open() as mine:
        answer = await mine.generate("def add(a, b):", sampling=Sampling(max_tokens=24))
        print(f"{answer.value} words: {answer.text!r}")


if __name__ == "__main__":
    trio.run(main)
