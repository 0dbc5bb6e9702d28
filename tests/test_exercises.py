"""The exercises: a split that holds, answers that fit, and training rows as the template writes."""

import json
from random import Random

import pytest
from exercises import KINDS, as_json, exercises, is_held_out
from tool_exercises import TOOL_KINDS, tool_exercises, toolbox, turn, written
from train_sage_tiny import END, TOOL_STAGES, USER, Corpus, Row, encode, render


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_give_the_same_exercises(kind):
    assert exercises(kind, 5, seed=2) == exercises(kind, 5, seed=2)
    assert exercises(kind, 5, seed=2) != exercises(kind, 5, seed=3)


@pytest.mark.parametrize("kind", TOOL_KINDS)
def test_the_same_arguments_give_the_same_exercises_with_tools(kind):
    assert tool_exercises(kind, 5, seed=2) == tool_exercises(kind, 5, seed=2)
    assert tool_exercises(kind, 5, seed=2) != tool_exercises(kind, 5, seed=3)


@pytest.mark.parametrize("held_out", [True, False])
def test_a_subject_of_a_tool_is_on_one_side_of_the_split(held_out):
    rng = Random(0)
    for _ in range(50):
        (tool,) = toolbox(rng, 1)
        asked = turn(rng, tool, held_out=held_out)
        arguments = asked.history[0]["tool_calls"][0]["function"]["arguments"]
        values = [str(value) for value in arguments.values()]
        content = " ".join(values if tool.aspect == "sum" else [tool.aspect, *values])
        assert is_held_out(content) == held_out


def test_an_answer_to_a_schema_is_json_with_values_of_the_prompt():
    for one in exercises("schema", 100, seed=0):
        found = json.loads(one.answer)
        assert 2 <= len(found) <= 4
        assert as_json(found) == one.answer
        assert all(str(value) in one.prompt and name in one.prompt for name, value in found.items())


def test_a_call_names_a_tool_that_is_shown_and_its_required_arguments():
    for one in tool_exercises("tool", 100, seed=0):
        made = json.loads(one.answer.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        shown = {tool["function"]["name"]: tool["function"]["parameters"] for tool in one.tools}
        parameters = shown[made["name"]]
        assert (
            set(parameters["required"]) <= set(made["arguments"]) <= set(parameters["properties"])
        )


def test_sums_need_no_tool_only_where_none_adds():
    for one in tool_exercises("no_tool", 100, seed=0):
        assert not {"add", "add_numbers"} & {tool["function"]["name"] for tool in one.tools}
        assert "<tool_call>" not in one.answer


def test_a_training_row_is_a_conversation_as_the_template_writes_it():
    for one in tool_exercises("tool_answer", 20, seed=0, held_out=False):
        row = Row()
        row.add(encode(render([], one.tools)), 0.0)
        row.add_turn(one)
        answered = [*one.messages, {"role": "assistant", "content": one.answer}]
        assert row.ids == encode(render(answered, one.tools))


def test_what_the_model_writes_counts_most():
    (one,) = tool_exercises("tool_answer", 1, seed=0)
    row = Row()
    row.add_turn(one)
    full = [token for token, weight in zip(row.ids, row.weights, strict=True) if weight > 0.1]
    assert full == [*encode(written(one.history[0])), END, *encode(one.answer), END]


def test_half_of_the_rows_of_the_last_stage_are_of_the_kinds_of_before():
    (stage,) = TOOL_STAGES
    assert stage.tools + stage.schemas <= 0.5
    ids, weights = Corpus(seed=0).batch(stage)
    assert ids.shape == weights.shape == (stage.num_rows, stage.seq_len + 1)
    assert USER in ids
