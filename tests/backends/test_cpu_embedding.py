"""The CPU embeds as transformers does: every family, every pooling, alone and in a batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_models import EMBEDDERS, make_embedder, reference_vectors

from sagellm.backends.cpu.device import CpuBackend
from sagellm.backends.text_batches import NO_KV, TextBatch, batch_inputs
from sagellm.graphs.models import build
from sagellm.runtime.models.embedding_files import HeadOptions
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.models.stored_weights import open_weights

BLIND = (("qwen3", "cls"), ("mistral", "cls"))  # the first token of a decoder sees no other
TEXTS = [[0, 7, 2], [0, 8, 2], [0, *range(10, 90), 2], [5], [0, 200, 201, 202, 2], [9]]


def vectors(folder: Path, texts: Any, *, native: bool = True, **how: Any) -> np.ndarray:
    found = resolve_model(str(folder), HeadOptions())
    device = CpuBackend(native=native).device()
    how = {"dtype": "float32", "deterministic": False, **how}
    graph = build(found.config, found.head)
    program = device.lower(graph, open_weights(found), layout=NO_KV, **how)
    queue = device.open_embedding_queue(2)
    try:
        return queue.embed(program, TextBatch(texts)).result()
    finally:
        queue.close()


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("family", EMBEDDERS)
def test_vectors_are_those_of_transformers(tmp_path: Path, family: str, pooling: str) -> None:
    folder = make_embedder(family, tmp_path, pooling=pooling)
    expected = np.array(reference_vectors(folder, TEXTS, pooling))
    assert abs(vectors(folder, TEXTS) - expected).max() < 1e-4
    if (family, pooling) not in BLIND:  # texts are told apart
        assert np.linalg.norm(expected[0] - expected[1]) > 0.01


@pytest.mark.parametrize("how", [{"native": False}, {"deterministic": True}])
def test_other_ways_to_compute_give_the_same_vectors(tmp_path: Path, how: dict[str, bool]) -> None:
    folder = make_embedder("bert", tmp_path, pooling="mean")
    expected = np.array(reference_vectors(folder, TEXTS, "mean"))
    assert abs(vectors(folder, TEXTS, **how) - expected).max() < 1e-4


def test_weights_in_bfloat16_come_close(tmp_path: Path) -> None:
    folder = make_embedder("bert", tmp_path, pooling="mean")
    expected = np.array(reference_vectors(folder, TEXTS, "mean"))
    found = vectors(folder, TEXTS, dtype="bfloat16")
    assert (found * expected).sum(axis=1).min() > 0.995


def test_vectors_are_not_scaled_where_the_folder_has_no_such_step(tmp_path: Path) -> None:
    folder = make_embedder("bert", tmp_path, pooling="mean", normalize=False)
    expected = np.array(reference_vectors(folder, TEXTS, "mean", normalize=False))
    found = vectors(folder, TEXTS)
    assert abs(found - expected).max() < 1e-3
    assert abs(np.linalg.norm(found, axis=1) - 1).min() > 0.1


def test_the_second_text_of_a_pair_has_types_of_its_own() -> None:
    inputs = batch_inputs(TextBatch([[5, 6, 7], [8, 9]], first_lens=[2, 2]))
    assert inputs.token_types is not None
    assert inputs.token_types.tolist() == [0, 0, 1, 0, 0]
    assert inputs.positions.tolist() == [0, 1, 2, 0, 1]
    assert inputs.query_starts.tolist() == [0, 3, 5]


def test_a_failed_launch_raises_at_its_ticket(tmp_path: Path) -> None:
    folder = make_embedder("bert", tmp_path)
    with pytest.raises(IndexError):
        vectors(folder, [[0, 300]])
    with pytest.raises(TypeError, match="programs that it lowered"):
        CpuBackend().device().open_embedding_queue(1).embed(object(), TextBatch([[1]]))
