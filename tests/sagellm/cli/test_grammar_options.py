from pathlib import Path

import pytest

from sagellm.cli.errors import Failure
from sagellm.cli.grammar_options import GrammarOptions
from sagellm.cli.run_options import RunSamplingOptions
from sagellm.runtime.grammars import choice_grammar
from sagellm.runtime.sampling import Grammar

SCHEMA = Grammar(kind="json_schema", text='{"type":"object"}')


def bound(**options: object) -> Grammar | None:
    """The grammar of a run with these options."""
    return RunSamplingOptions().bound_by(GrammarOptions(**options)).sampling.grammar  # type: ignore[arg-type]


def test_without_an_option_any_text_may_follow() -> None:
    assert bound() is None
    assert GrammarOptions().fields == {}
    assert RunSamplingOptions().bound_by(GrammarOptions()).given == {}


def test_a_schema_is_a_file_or_the_schema_itself(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(' {"type": "object"}')
    assert bound(json_schema=str(path)) == bound(json_schema='{"type": "object"}') == SCHEMA


def test_a_grammar_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "yes.lark"
    path.write_text('start: "yes"')
    assert bound(grammar=path) == Grammar(kind="lark", text='start: "yes"')


def test_a_regex_and_choices_bind_the_text() -> None:
    assert bound(regex="[0-9]+") == Grammar(kind="regex", text="[0-9]+")
    assert bound(choice=("yes", "no")) == choice_grammar(["yes", "no"])


def test_a_call_to_a_server_has_the_clients_names(tmp_path: Path) -> None:
    path = tmp_path / "own.ebnf"
    path.write_text("a dialect of another server")
    assert GrammarOptions(regex="a").fields == {"regex": "a"}
    assert GrammarOptions(choice=("a", "b")).fields == {"choices": ("a", "b")}
    assert GrammarOptions(grammar=path).fields == {"grammar": "a dialect of another server"}
    form = GrammarOptions(json_schema='{"type":"object"}').fields["response_format"]
    assert form["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    ("options", "said", "where"),
    [
        ({"regex": "a", "choice": ("b",)}, "--regex and --choice exclude each other", ""),
        ({"json_schema": "{]"}, "the schema is no JSON", "--json-schema"),
        ({"json_schema": "nowhere.json"}, "nowhere.json cannot be read", "--json-schema"),
        ({"grammar": Path("nowhere.lark")}, "nowhere.lark cannot be read", "--grammar"),
        ({"regex": "("}, "", "--regex"),
        ({"json_schema": '{"type":3}'}, "", "--json-schema"),
    ],
)
def test_a_wrong_form_names_its_option(options: dict[str, object], said: str, where: str) -> None:
    with pytest.raises(Failure) as caught:
        bound(**options)
    assert said in caught.value.cause
    assert caught.value.where == where
