"""Counting and cutting as the server does."""

import pytest
from gateway_calls import Client, gateway_before, playing, post

from sagellm.gateway.http.endpoints import detokenize, tokenize, tokenizer_info
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.models.tokenizer import load_tokenizer

TINY = load_tokenizer(resolve_model("sage-tiny"))


async def test_a_text_is_cut():
    answered = await post(tokenize, playing(), {"prompt": "hé", "return_token_strs": True})
    assert answered.json == {
        "count": 3,
        "max_model_len": 64,
        "tokens": [104, 195, 169],
        "token_strs": ["<0x68>", "<0xC3>", "<0xA9>"],
    }


async def test_strings_are_left_out_unasked():
    answered = await post(tokenize, playing(), {"prompt": "h"})
    assert answered.json["token_strs"] is None


async def test_a_conversation_is_cut_as_its_template_writes_it():
    body = {"messages": [{"role": "user", "content": "hi"}]}
    answered = await post(tokenize, playing(), body, tokenizer=TINY)
    assert answered.json["tokens"] == list(TINY.encode_chat(body["messages"]))


async def test_there_and_back():
    text = "na\u00efve \N{GRINNING FACE}"
    cut = await post(tokenize, playing(), {"prompt": text}, tokenizer=TINY)
    back = await post(detokenize, playing(), {"tokens": cut.json["tokens"]}, tokenizer=TINY)
    assert back.json == {"prompt": text}


@pytest.mark.parametrize("tokens", [[256], [-1], [2**63], [1.5], ["a"]])
async def test_ids_that_no_token_has_are_refused(tokens):
    answered = await post(detokenize, playing(), {"tokens": tokens})
    assert answered.status == 400
    assert answered.json["error"]["param"].startswith("tokens")


async def test_facts_of_a_tokenizer():
    answered = await Client().call(tokenizer_info, gateway_before(playing(), tokenizer=TINY))
    facts = answered.json
    assert (facts["eos_token"], facts["pad_token"]) == ("<|end|>", "<|endoftext|>")
    assert facts["chat_template"].startswith("{% if tools %}")
    assert (facts["vocab_size"], facts["model_max_length"]) == (264, 64)


async def test_facts_of_a_tokenizer_that_has_none():
    answered = await Client().call(tokenizer_info, gateway_before(playing()))
    assert answered.json["eos_token"] is None
    assert answered.json["chat_template"] is None
