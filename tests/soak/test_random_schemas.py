"""Ten thousand random schemas: every finished answer is valid, and none fails."""

import os

import pytest
from grammar_walks import follow_random_schemas

NUM_SCHEMAS = int(os.environ.get("SAGELLM_NUM_SCHEMAS", "10000"))


@pytest.mark.timeout(NUM_SCHEMAS / 5 + 60)
def test_every_finished_answer_is_valid() -> None:
    outcomes = follow_random_schemas(range(1000, 1000 + NUM_SCHEMAS))
    print(outcomes)
    assert outcomes.num_finished > 0.8 * NUM_SCHEMAS
    assert sum(outcomes.refused.values()) < 0.1 * NUM_SCHEMAS
