"""A SAGE pipeline: questions, retrieval from vectors, generation, and a sink that prints.

pip install isage
python examples/sage/pipeline.py
"""

import threading
from collections import Counter

import numpy as np
from sage.foundation import BatchFunction, MapFunction, SinkFunction
from sage.runtime import LocalEnvironment

from sagellm import Graph
from sagellm.sage import SubmitRequests, TokenEvents, close_graphs, register_graph

DOCUMENTS = [
    "The harbour opens at six in the morning.",
    "The lighthouse was built in 1871.",
    "Ferries leave every hour from pier two.",
]
QUESTIONS = ["When does the harbour open?", "When was the lighthouse built?"]
WORDS = sorted({word.strip(".?").lower() for text in DOCUMENTS for word in text.split()})


def vector(text: str) -> np.ndarray:
    """The counts of known words, of length 1."""
    counts = Counter(word.strip(".?").lower() for word in text.split())
    found = np.array([counts[word] for word in WORDS], dtype=np.float64)
    return found / (np.linalg.norm(found) or 1.0)


class Questions(BatchFunction):
    def __init__(self, questions: list[str]) -> None:
        super().__init__()
        self.left = list(questions)

    def execute(self) -> str | None:
        return self.left.pop(0) if self.left else None


class Retrieve(MapFunction):
    """Puts the nearest document before the question."""

    def __init__(self, documents: list[str]) -> None:
        super().__init__()
        self.documents = documents
        self.vectors = np.stack([vector(text) for text in documents])

    def execute(self, question: str) -> dict:
        nearest = self.documents[int(np.argmax(self.vectors @ vector(question)))]
        return {"id": question, "messages": [{"role": "user", "content": f"{nearest} {question}"}]}


class Print(SinkFunction):
    """Prints each answer once it is whole."""

    texts: dict[str, str] = {}  # noqa: RUF012 - shared with `main`, as SAGE makes the instance
    done = threading.Event()

    def execute(self, event) -> None:
        self.texts[event.id] = self.texts.get(event.id, "") + event.text
        if event.is_last:
            print(f"{event.id}  ->  {self.texts[event.id]}")
            if len(self.texts) == len(QUESTIONS):
                self.done.set()


def main() -> None:
    register_graph("llm", Graph.load("joint"))
    environment = LocalEnvironment("retrieval")
    environment.from_batch(Questions, QUESTIONS).map(Retrieve, DOCUMENTS).sink(
        SubmitRequests, "llm", max_tokens=24
    )
    environment.from_source(TokenEvents, "llm", num_requests=len(QUESTIONS)).sink(Print)
    environment.submit(autostop=True)
    Print.done.wait(60)
    close_graphs()


if __name__ == "__main__":
    main()
