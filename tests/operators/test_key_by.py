from typing import Any

from sagellm.operators.key_by import KeyByOptions, build
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Setup


def keyed(running: Any, function: Any, request: Any) -> Any:
    setup = Setup("key", functions={"f": function})
    (output,) = running(build(KeyByOptions("f"), setup))(Arrival(request))
    return output


def test_the_key_joins_the_other_tags(running: Any) -> None:
    request = Request(request_id="r", prompt="a b", user_id="u", tags={"other": "1"})
    item = keyed(running, lambda request: request.prompt.split()[0], request).item
    assert item.tags == {"other": "1", "key": "a"}
    assert item.user_id == "u"
    assert request.tags == {"other": "1"}


def test_a_key_is_text(running: Any) -> None:
    assert keyed(running, lambda request: 7, Request(request_id="r")).item.tags == {"key": "7"}


def test_without_a_key_the_request_fails(running: Any) -> None:
    event = keyed(running, lambda request: {}["secret"], Request(request_id="r")).event
    assert event.finish_reason == "failed"
    assert event.error == "key: the function f raised KeyError"
