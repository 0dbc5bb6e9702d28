"""The same graph inside an asyncio application, and from a plain thread."""

import asyncio

from sagellm import Graph, Sampling

QUESTION = [{"role": "user", "content": "Reverse the word apple."}]


async def main() -> None:
    async with Graph.load("graphs/joint.yaml").open() as session:
        async for token in session.stream(QUESTION, sampling=Sampling(max_tokens=16)):
            print(token.text, end="", flush=True)
        print()
        answers = await asyncio.gather(
            *(
                session.generate(f"def f{number}(", sampling=Sampling(max_tokens=8))
                for number in "ab"
            )
        )
        print([answer.text for answer in answers])


def from_a_thread() -> None:
    with Graph.load("graphs/joint.yaml").open() as session:
        for token in session.stream(QUESTION, sampling=Sampling(max_tokens=16)):
            print(token.text, end="", flush=True)
        print()


if __name__ == "__main__":
    asyncio.run(main())
    from_a_thread()
