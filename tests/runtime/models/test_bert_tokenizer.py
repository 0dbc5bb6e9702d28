"""Texts of BERT's tokenizer have the tokens of transformers, whatever tokenizer.json stores."""

import json
from pathlib import Path

import pytest
from embedding_models import make_embedder
from transformers import AutoTokenizer

from sagellm.runtime.models.embedding_files import HeadOptions
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.models.tokenizer import load_tokenizer

TEXTS = ["w1 W2 w3.", "w5\u00e9 w\u0301 7", "w1\u4e00w2", " w8\tw9\x00", ""]


@pytest.mark.parametrize(
    "options", [{}, {"do_lower_case": False}, {"strip_accents": True}, {"strip_accents": False}]
)
def test_tokens_are_those_of_transformers(tmp_path: Path, options: dict[str, bool]) -> None:
    folder = make_embedder("bert", tmp_path)
    config = {"tokenizer_class": "BertTokenizer", **options}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(resolve_model(str(folder), HeadOptions()))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours.warnings == ()
    assert ours.isolated_encoder is None
    for text in TEXTS:
        assert list(ours.encode(text)) == theirs(text)["input_ids"]
