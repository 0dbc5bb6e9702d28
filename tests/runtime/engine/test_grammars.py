"""Answers bound to a grammar: valid, and the same in every batch, split, preempted and resumed."""

import json
import re

import pytest
from detached import installed
from engine_driver import hand_over, running
from models_on_the_fly import EOS, byte_tokenizer, make_model, random_prompts
from msgspec import structs

from sagellm.backends.step import MatcherError
from sagellm.runtime.engine.kinds.local import open_engine
from sagellm.runtime.engine.kinds.modelled import ModelledOptions, open_modelled
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.port import EngineRefusal
from sagellm.runtime.sampling import Grammar, Sampling

PROMPTS = random_prompts((5, 17, 40, 64))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GRAMMARS = {
    "json": Grammar(kind="json_schema", text=json.dumps(SCHEMA)),
    "regex": Grammar(kind="regex", text="(ab|cd[0-9]{2}){3,20}"),
    "lark": Grammar(kind="lark", text='start: "<" word ("," word)* ">"\nword: /[a-z]{2,5}/'),
}
BOUND = Sampling(max_tokens=60, grammar=GRAMMARS["regex"])
SAMPLINGS = {
    "greedy": Sampling(max_tokens=150),
    "seeded": Sampling(max_tokens=150, temperature=1.5, seed=11),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(params=SAMPLINGS)
def sampling(request):
    return SAMPLINGS[request.param]


@pytest.fixture(params=GRAMMARS)
def grammar(request):
    return GRAMMARS[request.param]


def open_on(folder, **options):
    options = {"model": str(folder), "deterministic": True, "max_model_len": 256, **options}
    return open_engine(EngineOptions(**options), name="e")


def text_of(token_ids):
    return byte_tokenizer().decode([token for token in token_ids if token != EOS])


def check(grammar, token_ids, reason):
    """That a complete answer belongs to the grammar, and that all others were cut off."""
    text = text_of(token_ids)
    if reason != "stop":
        assert reason == "length"
    elif grammar.kind == "json_schema":
        found = json.loads(text)
        assert set(found) == {"name", "age", "tags"}
        assert 0 <= found["age"] <= 120
        assert set(found["tags"]) <= {"red", "blue"}
        assert len(found["name"]) <= 6
    else:
        wanted = {"regex": grammar.text, "lark": r"<[a-z]{2,5}(,[a-z]{2,5})*>"}
        assert re.fullmatch(wanted[grammar.kind], text)


async def answers(engine, sampling, prompts=PROMPTS, **fields):
    """Tokens and finish reason of each prompt, all at once."""
    async with running(engine) as [driver]:
        for index, prompt in enumerate(prompts):
            await driver.submit(str(index), prompt, sampling=sampling, **fields)
        await driver.all_done()
    replies = [driver.replies[str(index), 0] for index in range(len(prompts))]
    return [(reply.token_ids, reply.last.finish_reason) for reply in replies]


async def alone(folder, sampling, prompts=PROMPTS):
    found = []
    for prompt in prompts:
        found += await answers(open_on(folder), sampling, [prompt])
    return found


async def test_answers_belong_to_the_grammar_alone_and_batched(folder, grammar, sampling):
    bound = structs.replace(sampling, grammar=grammar)
    batched = await answers(open_on(folder), bound)
    assert batched == await alone(folder, bound)
    for token_ids, reason in batched:
        check(grammar, token_ids, reason)
    assert "stop" in {reason for _, reason in batched}


async def test_some_rows_of_a_batch_are_bound(folder, sampling):
    free = await alone(folder, sampling, PROMPTS[:2])
    bound = structs.replace(sampling, grammar=GRAMMARS["json"])
    right = await alone(folder, bound, PROMPTS[2:])
    async with running(open_on(folder)) as [driver]:
        for index, prompt in enumerate(PROMPTS):
            await driver.submit(str(index), prompt, sampling=bound if index > 1 else sampling)
        await driver.all_done()
    found = [driver.replies[str(index), 0].token_ids for index in range(4)]
    assert found == [token_ids for token_ids, _ in free + right]


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 22, "block_size": 8, "max_num_batched_tokens": 16},
        {"speculation": "ngram"},
        {"max_num_seqs": 2, "prefill_chunk": 7},
    ],
    ids=["preempted", "ngram", "chunked"],
)
async def test_how_it_is_scheduled_changes_no_token(folder, grammar, sampling, options):
    bound = structs.replace(sampling, grammar=grammar, max_tokens=40)
    right = await alone(folder, bound)
    engine = open_on(folder, **{"max_model_len": 128, **options})
    assert await answers(engine, bound) == right
    if grammar is GRAMMARS["json"]:  # the others are short
        assert bool(engine.load.num_preemptions) == ("num_blocks" in options)
        assert bool(engine.load.drafts.num_draft_tokens) == ("speculation" in options)


async def test_drafts_of_a_model_change_no_token(folder, sampling, tmp_path):
    other = make_model("qwen3", tmp_path, seed=1)
    bound = structs.replace(sampling, grammar=GRAMMARS["json"])
    engine = open_on(folder, speculation="draft", draft_model=str(other))
    assert await answers(engine, bound) == await alone(folder, bound)


async def test_a_device_that_feeds_itself_samples_the_same(folder, grammar, sampling):
    bound = structs.replace(sampling, grammar=grammar)
    right = await alone(folder, bound)
    with installed():
        assert await answers(open_on(folder, device="detached"), bound) == right


async def test_an_answer_that_is_handed_over_is_the_same(folder, grammar, sampling):
    bound = structs.replace(sampling, grammar=grammar)
    [(right, reason)] = await alone(folder, bound, PROMPTS[:1])
    async with running(open_on(folder), open_on(folder)) as [source, target]:
        first, rest = await hand_over(source, target, "r", PROMPTS[0], sampling=bound)
    assert first.token_ids + (rest.token_ids if rest is not first else []) == right
    assert rest.last.finish_reason == reason


async def test_an_answer_resumes_after_any_token(folder, grammar, sampling):
    bound = structs.replace(sampling, grammar=grammar)
    [(right, _)] = await alone(folder, bound, PROMPTS[:1])
    for num_emitted in (1, len(right) // 2, len(right) - 1):
        [(rest, _)] = await answers(
            open_on(folder), bound, PROMPTS[:1], emitted_token_ids=tuple(right[:num_emitted])
        )
        assert right[:num_emitted] + rest == right


async def test_a_finished_grammar_ends_an_answer_that_ignores_the_end(folder):
    sampling = Sampling(
        max_tokens=60, ignore_eos=True, grammar=Grammar(kind="regex", text="abcdef")
    )
    for token_ids, reason in await answers(open_on(folder), sampling):
        assert text_of(token_ids) == "abcdef"
        assert EOS not in token_ids
        assert reason == "stop"


async def test_an_answer_that_cannot_go_on_does_not_look_complete(folder):
    grammar = Grammar(kind="regex", text="a[0-9]b|ac")
    tokens = {text: byte_tokenizer().token_to_id(text) for text in "abc"}
    for banned, reason in (("b", "refused"), ("c", "stop")):
        banned_ids = ((tokens[banned],), (tokens["c"],)) if banned == "b" else ((tokens["c"],),)
        sampling = Sampling(max_tokens=9, grammar=grammar, bad_words_token_ids=banned_ids)
        [(token_ids, found)] = await answers(open_on(folder), sampling, PROMPTS[:1])
        assert found == reason
        assert re.fullmatch("a[0-9]" if reason == "refused" else "a[0-9]b", text_of(token_ids))


async def test_min_tokens_beyond_a_grammar_end_a_complete_answer(folder):
    sampling = Sampling(max_tokens=60, min_tokens=50, grammar=Grammar(kind="regex", text="abcdef"))
    for token_ids, reason in await answers(open_on(folder), sampling):
        assert (text_of(token_ids), reason) == ("abcdef", "stop")


async def test_choices_and_logprobs(folder):
    sampling = Sampling(
        max_tokens=40, temperature=50.0, seed=2, logprobs=2, grammar=GRAMMARS["regex"]
    )
    async with running(open_on(folder)) as [driver]:
        replies = [
            await driver.submit("r", PROMPTS[0], choice=choice, sampling=sampling)
            for choice in range(3)
        ]
        await driver.all_done()
    assert len({tuple(reply.token_ids) for reply in replies}) == 3
    for reply in replies:
        check(GRAMMARS["regex"], reply.token_ids, reply.last.finish_reason)
        logprobs = [one for event in reply.events for one in event.logprobs]
        assert [one.token_id for one in logprobs] == reply.token_ids
        assert all(one.logprob <= 0 and len(one.top) == 2 for one in logprobs)


async def test_an_engine_without_masks_refuses_a_grammar():
    engine = open_modelled(ModelledOptions(model="sage-tiny", num_blocks=128), name="e")
    async with running(engine) as [driver]:
        with pytest.raises(EngineRefusal, match="grammar"):
            await driver.submit("r", (1, 2), sampling=Sampling(grammar=GRAMMARS["json"]))
        driver.replies.clear()


async def test_an_answer_that_began_outside_the_grammar_is_refused(folder):
    outside = tuple(byte_tokenizer().encode("hello").ids)
    async with running(open_on(folder)) as [driver]:
        reply = await driver.submit("r", PROMPTS[0], sampling=BOUND, emitted_token_ids=outside)
        await driver.all_done()
    assert (reply.last.finish_reason, reply.last.code) == ("refused", "invalid_grammar")
    assert reply.last.error == "the tokens so far do not belong to the grammar"


class LimitedMatcher:
    """Follows a matcher for some tokens, then exceeds its limits."""

    def __init__(self, inside, num_tokens):
        self.inside, self.num_tokens = inside, num_tokens

    @property
    def vocab_size(self):
        return self.inside.vocab_size

    def fill(self, output, mask):
        if len(output) == self.num_tokens:
            raise MatcherError("the grammar is too complex")
        self.inside.fill(output, mask)


async def test_a_grammar_past_its_limits_ends_its_sequence_alone(folder):
    engine = open_on(folder)
    compile_ = engine._loop.grammars._compiler.compile

    class Limited:
        def compile(self, *args, **options):
            return LimitedMatcher(compile_(*args, **options), 3)

    engine._loop.grammars._compiler = Limited()
    async with running(engine) as [driver]:
        reply = await driver.submit("bound", PROMPTS[0], sampling=BOUND)
        free = await driver.submit("free", PROMPTS[1], max_tokens=8)
        await driver.all_done()
    assert (reply.last.finish_reason, reply.last.code) == ("refused", "invalid_grammar")
    assert reply.last.error == "the grammar is too complex"
    assert len(reply.token_ids) == 3
    assert len(free.token_ids) == 8
