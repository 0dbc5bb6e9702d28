"""Answers bound to a JSON schema beside free ones: `sagellm bench grammars`.

The model has the 0.5B shape with random weights, and a byte-level BPE tokenizer of its whole
vocabulary, trained on Python's own library and the installed packages. A random model is the worst
case of greedy sampling: its own choice is seldom allowed.
"""

import json
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cyclopts import App
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.cells import Cell
from benchmarks.engine import RESULTS
from benchmarks.machine import cpu_name, describe
from benchmarks.ours import bench_graph
from benchmarks.overhead import Call, noted_calls
from benchmarks.peers.engines import PEERS
from benchmarks.peers.group import LOAD_S, RUN_S
from benchmarks.peers.living import LivingPeer
from benchmarks.shape import QWEN05
from benchmarks.weights import cache_folder, model_folder
from sagellm import Sampling
from sagellm.backends.token_masks import MaskThread
from sagellm.opening.bridge import BlockingSession
from sagellm.runtime.sampling import Grammar

APP = App(name="sagellm bench grammars", help=__doc__)
TRAINING_BYTES = 48 << 20
SCHEMA = {
    "type": "array",
    "minItems": 64,  # no answer ends before the cell does
    "items": {
        "type": "object",
        "properties": {
            "id": {"type": "integer"},
            "name": {"type": "string"},
            "kind": {"enum": ["alpha", "beta", "gamma"]},
            "scores": {"type": "array", "items": {"type": "number"}, "maxItems": 4},
        },
        "required": ["id", "name", "kind", "scores"],
        "additionalProperties": False,
    },
}
GRAMMAR = Grammar(kind="json_schema", text=json.dumps(SCHEMA))


@APP.default
def grammars(
    *, rounds: int = 4, batch: int = 32, out_tokens: int = 96, threads: int = 2,
    vllm: bool = False, output: Path = RESULTS,
) -> None:  # fmt: skip
    """Measure, print, and keep the result.

    Parameters
    ----------
    rounds
        Rounds; in each, the free and the bound answers take turns.
    batch
        Sequences at once.
    out_tokens
        Tokens of each answer.
    threads
        Threads of the engine.
    vllm
        Measure vLLM's CPU build too, in turns; its environment is made when first needed.
    output
        The folder for grammars-CPU.json.
    """
    torch.set_num_threads(threads)
    cell = Cell("grammars", "batch", batch, 128, out_tokens)
    beside = living_vllm(cell, threads) if vllm else nullcontext()
    with bench_graph(tokenized_folder(), threads).open() as session, beside as peer:
        warm_up(session, cell)
        runs, peer_runs = [], []
        for number in range(rounds):
            runs.append(measure(session, cell, number))
            if peer is not None:
                peer_runs.append(measure_peer(peer, cell, number))
    record = {
        "command": " ".join(["sagellm bench grammars", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "batch": batch,
        "out_tokens": out_tokens,
        "rounds": runs,
        "overhead": overhead(runs),
    }
    if peer_runs:
        record |= {"vllm_rounds": peer_runs, "vllm_overhead": overhead(peer_runs)}
    name = "-".join(cpu_name().lower().replace("(", "").replace(")", "").split())
    (output / f"grammars-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in record if "overhead" in key}, indent=1))


def tokenized_folder() -> Path:
    """The folder of the 0.5B shape with a tokenizer that has bytes; made once, in minutes."""
    folder, weights = cache_folder() / "random-qwen05-bpe", model_folder(QWEN05)
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file in weights.iterdir():
            if file.name != "tokenizer.json" and not (folder / file.name).exists():
                (folder / file.name).hardlink_to(file)
        trained_tokenizer(QWEN05.vocab_size).save(str(folder / "tokenizer.json"))
    return folder


def trained_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE. Tokens that the text does not give are filled up."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    made.train_from_iterator(training_texts(), trainer)
    missing = vocab_size - made.get_vocab_size()
    made.add_tokens([f"<filler {number}>" for number in range(missing)])
    return made


def training_texts() -> Iterator[str]:
    left = TRAINING_BYTES
    for key in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(key)).rglob("*.py")):
            text = path.read_text(errors="replace")
            left -= len(text)
            if left < 0:
                return
            yield text


def warm_up(session: BlockingSession, cell: Cell) -> None:
    """Compile the grammar, and touch the pool."""
    for grammar in (None, GRAMMAR):
        decode(session, Cell("warm", "batch", cell.num_sequences, 128, 4), 0, grammar)


def measure(session: BlockingSession, cell: Cell, number: int) -> dict[str, float]:
    """One round: the time of a decode step, free and bound, and how late the masks were."""
    order = (None, GRAMMAR) if number % 2 else (GRAMMAR, None)
    found: dict[str, float] = {}
    for grammar in order:
        with noted_calls() as calls, noted_masks() as masks:
            decode(session, cell, number, grammar)
        step_ms = [1e3 * (after - before) for before, after in steps(calls, cell.num_sequences)]
        found["free_ms" if grammar is None else "bound_ms"] = round(statistics.median(step_ms), 3)
        if grammar is not None:
            found |= lateness(calls, masks)
    print(found, file=sys.stderr)
    return found


def decode(session: BlockingSession, cell: Cell, number: int, grammar: Grammar | None) -> None:
    sampling = Sampling(max_tokens=cell.num_out, ignore_eos=True, grammar=grammar)
    streams = [session.stream(prompt, sampling=sampling) for prompt in cell.prompts(number)]
    num_tokens = sum(len(event.token_ids) for stream in streams for event in stream)
    if num_tokens != cell.num_sequences * cell.num_out:
        raise RuntimeError(f"{num_tokens} tokens came out")


@contextmanager
def living_vllm(cell: Cell, threads: int) -> Iterator[LivingPeer]:
    """vLLM with the same model, after a short answer of each kind."""
    peer = PEERS["vllm"]
    length = cell.prompt_len + cell.num_out + 8
    with (
        tempfile.TemporaryDirectory() as folder,
        LivingPeer(peer.command(), peer.variables(threads), Path(folder) / "log") as living,
    ):
        living.ask(
            "load",
            timeout_s=LOAD_S,
            path=str(tokenized_folder()),
            row="bf16",
            threads=threads,
            max_len=length,
            max_seqs=cell.num_sequences,
            max_tokens=cell.num_sequences * length,
            tokenizer=True,
        )
        for schema in (None, GRAMMAR.text):
            ask_peer(living, Cell("warm", "batch", cell.num_sequences, 128, 4), 0, schema)
        yield living


def measure_peer(peer: LivingPeer, cell: Cell, number: int) -> dict[str, float]:
    """One round of the peer: the median time between two tokens of a sequence."""
    order = (None, GRAMMAR.text) if number % 2 else (GRAMMAR.text, None)
    found = {
        "free_ms" if schema is None else "bound_ms": ask_peer(peer, cell, number, schema)
        for schema in order
    }
    print({"vllm": found}, file=sys.stderr)
    return found


def ask_peer(peer: LivingPeer, cell: Cell, number: int, schema: str | None) -> float:
    answer = peer.ask(
        "run",
        timeout_s=RUN_S,
        prompts=cell.prompts(number),
        num_out=cell.num_out,
        schema=schema,
    )
    gaps = [after - before for times in answer["times"] for before, after in pairwise(times)]
    return float(round(1e3 * statistics.median(gaps), 3))


def steps(calls: Sequence[Call], num_decoding: int) -> list[tuple[float, float]]:
    """Starts of consecutive decode steps of the whole batch."""
    whole = [call.start_s for call in calls if call.num_decoding == num_decoding]
    return list(pairwise(whole))


@contextmanager
def noted_masks() -> Iterator[list[tuple[float, float]]]:
    """Record when the masks of each launch began and ended to be computed."""
    times: list[tuple[float, float]] = []
    start = MaskThread.start

    def noted(self: Any, rows: Sequence[Any]) -> "Future[Any]":
        begun_s = time.perf_counter()
        masks = start(self, rows)
        masks.add_done_callback(lambda _: times.append((begun_s, time.perf_counter())))
        return masks

    MaskThread.start = noted  # type: ignore[method-assign]
    try:
        yield times
    finally:
        MaskThread.start = start  # type: ignore[method-assign]


def lateness(calls: Sequence[Call], masks: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of all steps: the time of the masks, and the time that a step's logits waited for them."""
    taken = [1e3 * (end_s - begun_s) for begun_s, end_s in masks]
    ends = iter(sorted(masks))
    waited = []
    for call in calls:
        mask = next(ends, None)
        if mask is not None:
            waited.append(max(0.0, 1e3 * (mask[1] - call.end_s)))
    return {
        "masks_ms": round(statistics.median(taken), 3),
        "masks_waited_ms": round(statistics.median(waited), 3),
        "masks_waited_max_ms": round(max(waited), 3),
        "num_steps_that_waited": sum(one > 0 for one in waited),
        "num_steps": len(waited),
    }


def overhead(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median ratio of a bound step to a free step of the same round, less one."""
    ratios = [run["bound_ms"] / run["free_ms"] for run in runs]
    return {
        "itl": round(statistics.median(ratios) - 1, 4),
        "least": round(min(ratios) - 1, 4),
        "most": round(max(ratios) - 1, 4),
    }


def main() -> int:
    """Measure."""
    APP(result_action="return_none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
