"""Options and sizing: an option that no engine can obey is refused, with its name and a fix."""

import dataclasses

import pytest

from sagellm.backends import KVLayout
from sagellm.runtime.engine.options import EngineOptionError, EngineOptions, num_bytes
from sagellm.runtime.engine.sizing import engine_dtype, engine_facts, size
from sagellm.runtime.models.folder import NULL_FACTS, resolve_model

GIB = 2**30
SMALL = dataclasses.replace(NULL_FACTS, max_model_len=1000)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("4096", 4096), ("256MiB", 256 * 2**20), ("1.5 GB", 1_500_000_000), ("2KiB", 2048)],
)
def test_sizes(text, wanted):
    assert num_bytes(text) == wanted


@pytest.mark.parametrize("text", ["", "much", "12 XB", "-1MiB"])
def test_what_is_no_size(text):
    with pytest.raises(EngineOptionError, match="is not a size"):
        EngineOptions(kv_memory=text)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_size": 0}, "block_size: 0 is too small; give at least 1"),
        ({"max_num_batched_tokens": 1}, "max_num_batched_tokens"),
        ({"num_blocks": 4, "kv_memory": "1GiB"}, "both size the KV pool"),
        ({"speculation": "ngrm"}, "speculation: 'ngrm' is unknown; did you mean ngram?"),
        ({"speculation": "42"}, "use ngram or draft"),
        ({"speculation": "draft"}, "draft needs draft_model"),
        ({"speculation": "ngram", "draft_model": "sage-tiny"}, "set speculation: draft, or drop"),
        ({"draft_model": "sage-tiny"}, "draft_model: nothing is drafted without speculation"),
        ({"num_draft_tokens": 4}, "num_draft_tokens: nothing is drafted without speculation"),
        ({"speculation": "ngram", "num_draft_tokens": 0}, "give at least 1"),
        (
            {"speculation": "ngram", "max_num_batched_tokens": 4},
            "exceed max_num_batched_tokens: 4; give fewer",
        ),
        ({"device": "null"}, "device: null computes nothing, .*; write kind: modelled"),
        ({"device": "null:0"}, "write kind: modelled"),
        ({"model": "null"}, "model: null computes nothing, .*; write kind: modelled"),
    ],
)
def test_options_that_cannot_be_obeyed(options, reason):
    with pytest.raises(EngineOptionError, match=reason):
        EngineOptions(**options)


def test_the_default_pool_holds_eight_of_the_longest():
    sizing = size(EngineOptions(), SMALL, 100 * GIB)
    assert sizing.num_blocks == 8 * 63
    assert sizing.max_model_len == 1000


def test_little_memory_shrinks_pool_and_context():
    block_bytes = size(EngineOptions(), SMALL, 100 * GIB).block_bytes
    sizing = size(EngineOptions(), SMALL, 40 * block_bytes)
    assert (sizing.num_blocks, sizing.max_model_len) == (10, 160)


def test_kv_memory_is_kept():
    sizing = size(EngineOptions(kv_memory="100MiB"), SMALL, 100 * GIB)
    assert sizing.pool_bytes <= 100 * 2**20 < sizing.pool_bytes + sizing.block_bytes


def test_a_pool_smaller_than_one_sequence_is_refused():
    with pytest.raises(
        EngineOptionError, match="set max_model_len: 64 or less, or num_blocks: 63 or more"
    ):
        size(EngineOptions(num_blocks=4), SMALL, GIB)
    assert size(EngineOptions(num_blocks=4, max_model_len=64), SMALL, GIB).num_blocks == 4


def test_no_memory_at_all_is_refused():
    with pytest.raises(EngineOptionError, match="0 blocks"):
        size(EngineOptions(), SMALL, 0)


def test_a_longer_context_than_the_model_is_refused():
    with pytest.raises(EngineOptionError, match="was made for 1000 tokens, not 1001"):
        size(EngineOptions(max_model_len=1001), SMALL, GIB)


@pytest.mark.parametrize(
    ("model", "option", "wanted"),
    [
        ("bfloat16", None, "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float16", None, "float32"),
    ],
)
def test_dtypes(model, option, wanted):
    facts = dataclasses.replace(SMALL, dtype=model)
    assert engine_dtype(EngineOptions(dtype=option), facts) == wanted


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_dtypes_that_are_not_built(dtype):
    with pytest.raises(EngineOptionError, match="use float32 or bfloat16"):
        engine_dtype(EngineOptions(dtype=dtype), SMALL)


def facts_of(**options):
    chosen, folder = EngineOptions(**options), resolve_model("sage-tiny")
    return engine_facts(chosen, folder, size(chosen, folder.facts, GIB))


def test_block_bytes_are_those_of_the_backend():
    facts, model = facts_of(), resolve_model("sage-tiny").facts
    shape = (model.num_layers, model.num_kv_heads, model.head_dim, 16)
    assert facts.kv_block_bytes == KVLayout(*shape, dtype="bfloat16").block_bytes


def test_hashes_differ_where_engines_cannot_exchange_blocks():
    same, other = facts_of(), facts_of(max_num_seqs=3)
    assert (same.model_hash, same.layout_hash) == (other.model_hash, other.layout_hash)
    assert facts_of(block_size=8).layout_hash != same.layout_hash
    assert facts_of(dtype="float32").model_hash != same.model_hash
