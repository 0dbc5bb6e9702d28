"""Whether a model's head is its embeddings: as the folder stores them, not as config.json says.

transformers ties them only where the file holds one of them, or both alike
(`PreTrainedModel.tie_weights`). A fine-tune may have changed one, and kept the setting.
"""

from collections.abc import Mapping
from pathlib import Path

from sagellm.runtime.models.files import StoredTensor
from sagellm.runtime.models.fit import EMBEDDINGS, HEAD

TIE = "tie_word_embeddings"
_CHUNK_BYTES = 1 << 20


def untied_if_different(
    config: Mapping[str, object], path: Path, tensors: Mapping[str, StoredTensor]
) -> Mapping[str, object]:
    """The configuration, untied where the folder holds a head that differs from the embeddings."""
    head, embeddings = tensors.get(HEAD), tensors.get(EMBEDDINGS)
    if not config.get(TIE) or head is None or embeddings is None:
        return config
    return config if _is_same(path, head, embeddings) else {**config, TIE: False}


def _is_same(path: Path, one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are equal, byte for byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with (path / one.file).open("rb") as first, (path / other.file).open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        for offset in range(0, one.num_bytes, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, one.num_bytes - offset)
            if first.read(length) != second.read(length):
                return False
    return True
