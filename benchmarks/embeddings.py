"""Texts a second of one model that embeds: of sagellm, or of sentence-transformers.

    python -m benchmarks.embeddings FOLDER sagellm|sentence-transformers [THREADS]

Prints the median of a text of 12 words, and of 64 texts of 8 to 63 words, tokenizers included.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from sagellm import Graph, ops

Embed = Callable[[Sequence[str]], Any]


def texts_of(generator: random.Random) -> dict[int, list[str]]:
    """The texts of both measurements, by their number."""

    def text(num_words: int) -> str:
        return " ".join(f"w{generator.randrange(2000)}" for _ in range(num_words))

    return {1: [text(12)], 64: [text(generator.randrange(8, 64)) for _ in range(64)]}


def measure(embed: Embed) -> None:
    """Print the median time of each batch, after one that is not counted."""
    for number, texts in texts_of(random.Random(0)).items():
        embed(texts)
        times = [timed(embed, texts) for _ in range(15 if number == 1 else 3)]
        seconds = statistics.median(times)
        print(f"batch {number}: {seconds * 1000:.1f} ms, {number / seconds:.1f} texts/s")


def timed(embed: Embed, texts: Sequence[str]) -> float:
    """The seconds of one call."""
    begun = time.perf_counter()
    embed(texts)
    return time.perf_counter() - begun


def with_sagellm(folder: str, threads: int) -> None:
    """Measure a session with an engine of kind `embedding`."""
    graph = Graph("t").engine("e", kind="embedding", model=folder, threads=threads)
    graph >> ops.embed(engine="e")
    with graph.open() as session:
        measure(session.embed)


def with_sentence_transformers(folder: str, threads: int) -> None:
    """Measure `SentenceTransformer.encode`."""
    torch = import_module("torch")  # only here: the other side must not load it at the start
    torch.set_num_threads(threads)
    model = import_module("sentence_transformers").SentenceTransformer(folder, device="cpu")
    measure(lambda texts: model.encode(list(texts), batch_size=64, show_progress_bar=False))


SIDES = {"sagellm": with_sagellm, "sentence-transformers": with_sentence_transformers}

if __name__ == "__main__":
    SIDES[sys.argv[2]](sys.argv[1], int(sys.argv[3]) if len(sys.argv) > 3 else 2)
