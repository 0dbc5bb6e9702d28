"""A second of random grammars: each is refused with a reason, or followed within limits."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_grammars import take


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=150))
def test_any_grammar_is_refused_or_followed(data: bytes) -> None:
    take(data)
