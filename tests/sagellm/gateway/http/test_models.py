"""Models: listed, found by name only, and unknown to everything that generates otherwise."""

import pytest
from gateway_calls import Client, gateway_before, last, playing, post

from sagellm.gateway.http.endpoints import chat, completions, detokenize, model, models, tokenize

CARD = {
    "object": "model",
    "created": 7,
    "owned_by": "sagellm",
    "root": "m",
    "parent": None,
    "max_model_len": 64,
}
BODIES = [
    (completions, {"prompt": "a"}),
    (chat, {"messages": [{"role": "user", "content": "a"}]}),
    (tokenize, {"prompt": "a"}),
    (detokenize, {"tokens": [1]}),
]


async def test_every_name_is_listed():
    answered = await post(models, playing(), {})
    assert answered.json == {
        "object": "list",
        "data": [{"id": "m", **CARD}, {"id": "alias", **CARD}],
    }


async def test_one_is_found_by_its_name():
    answered = await Client(id="alias").call(model, gateway_before(playing()))
    assert answered.json == {"id": "alias", **CARD}


@pytest.mark.parametrize("name", ["../../etc/passwd", "M", "m/", "a/../m", "m\x00", ""])
async def test_another_is_not_found(name):
    answered = await Client(id=name).call(model, gateway_before(playing()))
    assert answered.status == 404
    assert answered.json["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(("endpoint", "body"), BODIES)
async def test_a_model_that_is_not_served_is_not_found(endpoint, body):
    answered = await post(endpoint, playing([last("x")]), {**body, "model": "m2"})
    assert answered.status == 404
    assert answered.json["error"]["type"] == "not_found_error"
    assert answered.json["error"]["code"] == "model_not_found"
    assert "m2" not in answered.json["error"]["message"]


@pytest.mark.parametrize(("endpoint", "body"), BODIES[:2])
async def test_answers_say_the_first_name(endpoint, body):
    for named in ({"model": "alias"}, {"model": "m"}, {}):
        answered = await post(endpoint, playing([last("x")]), {**body, **named})
        assert answered.json["model"] == "m"
