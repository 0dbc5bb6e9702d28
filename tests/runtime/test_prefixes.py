"""Cached prefixes: hashed as engines hash, within the salt of one tenant."""

import random
import secrets

from immutables import Map
from msgspec.structs import replace

from sagellm.runtime.kv.prefix_tree import BlockKey, block_key
from sagellm.runtime.messages import Request
from sagellm.runtime.prefixes import Hasher, PrefixIndex, PromptHashes, hash_secret
from sagellm.runtime.sampling import Sampling

SIZE = 4
KEY = hash_secret()


def ask(*tokens: int, salt: str = "", **fields: object) -> Request:
    return Request(request_id="r", prompt_token_ids=tokens, salt=salt, **fields)  # type: ignore[arg-type]


def engine_hashes(tokens: tuple[int, ...], salt: str = "") -> list[bytes]:
    """The hashes of full blocks as an engine of this process computes them."""
    keys: list[BlockKey] = []
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        keys.append(block_key(keys[-1] if keys else None, tokens[start : start + SIZE], salt))
    return [key.short for key in keys]


def index_of(*held: tuple[int, tuple[int, ...]], salt: str = "") -> PrefixIndex:
    """The index of replicas that have these tokens, given as (replica, tokens)."""
    blocks: dict[bytes, int] = {}
    for replica, tokens in held:
        for block in engine_hashes(tokens, salt):
            blocks[block] = blocks.get(block, 0) | 1 << replica
    return PrefixIndex(SIZE, Map(blocks))


def test_a_router_hashes_as_engines_do() -> None:
    tokens = tuple(range(21))
    hashes = PromptHashes(tokens, "tenant", SIZE, KEY)
    assert hashes.num_blocks == 5
    assert [hashes[index] for index in (4, 0, 1, 2, 3)] == [
        engine_hashes(tokens, "tenant")[index] for index in (4, 0, 1, 2, 3)
    ]
    other = PromptHashes(tokens, "tenant", SIZE, secrets.token_bytes(32))
    assert other[0] != hashes[0]


def test_the_last_token_is_never_cached() -> None:
    index = index_of((0, tuple(range(8))))
    assert index.cached(ask(*range(8)), Hasher(KEY)).most == 4
    assert index.cached(ask(*range(9)), Hasher(KEY)).most == 8


def test_each_replica_has_as_much_as_it_has() -> None:
    tokens = tuple(range(16))
    index = index_of((0, tokens[:4]), (1, tokens[:12]), (3, tokens[:4]), (5, (9,) * 8))
    cached = index.cached(ask(*tokens, 1), Hasher(KEY))
    assert cached.levels == ((12, 0b10), (4, 0b1001))
    assert [cached.num_tokens(replica) for replica in range(6)] == [4, 12, 0, 4, 0, 0]
    among = index.cached(ask(*tokens, 1), Hasher(KEY), among=0b1001)
    assert among.levels == ((4, 0b1001),)


def test_equal_prompts_of_two_tenants_share_nothing() -> None:
    tokens = tuple(range(9))
    index = index_of((0, tokens), salt="one")
    assert index.cached(ask(*tokens, salt="one"), Hasher(KEY)).most == 8
    assert index.cached(ask(*tokens, salt="other"), Hasher(KEY)).most == 0
    assert index.cached(ask(*tokens), Hasher(KEY)).most == 0


def test_what_a_resumed_request_has_emitted_counts() -> None:
    index = index_of((0, tuple(range(12))))
    resumed = ask(*range(6), emitted_token_ids=(6, 7, 8))
    assert index.cached(resumed, Hasher(KEY)).most == 8


def test_a_prompt_that_is_scored_is_computed_whole() -> None:
    index = index_of((0, tuple(range(12))))
    scored = ask(*range(12), sampling=Sampling(prompt_logprobs=1))
    assert index.cached(scored, Hasher(KEY)).most == 0


def test_a_lookup_agrees_with_trying_every_replica() -> None:
    draw = random.Random(5)
    for _ in range(100):
        held = [
            (replica, tuple(draw.randint(0, 1) for _ in range(draw.randint(0, 24))))
            for replica in range(6)
        ]
        index, prompt = index_of(*held), tuple(draw.randint(0, 1) for _ in range(21))
        cached = index.cached(ask(*prompt), Hasher(KEY))
        for replica, tokens in held:
            same = 0
            while same < 5 and prompt[: (same + 1) * SIZE] == tokens[: (same + 1) * SIZE]:
                same += 1
            assert cached.num_tokens(replica) == same * SIZE


def test_nothing_is_hashed_that_no_replica_has() -> None:
    hasher, request = Hasher(KEY), ask(*range(40_000))
    assert PrefixIndex(SIZE).cached(request, hasher).most == 0
    assert not hasher._kept
    assert index_of((0, (7,) * 8)).cached(request, hasher).most == 0
    assert len(hasher.hashes(request, SIZE)._hashes) == 1


def test_hashes_are_kept_for_the_next_that_asks_within_bounds() -> None:
    hasher, request = Hasher(KEY), ask(*range(100))
    again = replace(request, placement={"g": 1}, num_cached_tokens=4)
    assert hasher.hashes(request, SIZE) is hasher.hashes(again, SIZE)
    assert hasher.hashes(request, SIZE) is not hasher.hashes(request, 8)
    many = [ask(*range(200_000)) for _ in range(8)]
    for one in many:
        hasher.hashes(one, SIZE)
    assert len(hasher._kept) == 5
