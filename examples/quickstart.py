"""Ask the prefill/decode graph a question, and print the tokens as they come."""

import trio

from sagellm import Graph, Sampling


async def main() -> None:
    async with Graph.load("graphs/pd.yaml").open() as pd:
        question = [{"role": "user", "content": "What is 23 + 45?"}]
        async for token in pd.stream(question, sampling=Sampling(max_tokens=32)):
            print(token.text, end="", flush=True)
    print()


if __name__ == "__main__":
    trio.run(main)
