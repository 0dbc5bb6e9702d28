"""Search by vectors: the text nearest to a question, in this process or on a server (a URL)."""

import sys

from sagellm import UnifiedInferenceClient

TEXTS = ["def add(a, b): return a + b", "12 + 7 = 19", "Ada lives in Paris."]


def nearest(question: list[float], vectors: list[list[float]]) -> int:
    """The number of the vector with the largest cosine: vectors have length 1."""
    scores = [sum(a * b for a, b in zip(question, one, strict=True)) for one in vectors]
    return scores.index(max(scores))


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else None
    model = "sage-tiny" if url is None else None  # a real model: BAAI/bge-small-en-v1.5
    with UnifiedInferenceClient.create(
        url, embedded=url is None, default_embedding_model=model
    ) as client:
        vectors = client.embed(TEXTS)
        (question,) = client.embed(["11 + 8 = 19"])
        print(TEXTS[nearest(question, vectors)])


if __name__ == "__main__":
    main()
