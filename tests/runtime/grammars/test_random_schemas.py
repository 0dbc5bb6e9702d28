"""Answers of a random model by random schemas are valid: a few here, many in `make soak`."""

from grammar_walks import follow_random_schemas


def test_every_finished_answer_is_valid() -> None:
    outcomes = follow_random_schemas(range(150))
    assert outcomes.num_finished > 120
    assert set(outcomes.refused) <= {
        "oneOf: options that a value could match together are not supported; give each a required"
        " property with a const of its own, or use anyOf",
        "no text can satisfy the schema",
    }
