"""The options of `sagellm run`, in groups, and the check that they fit together."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from sagellm.cli.errors import Failure
from sagellm.cli.grammar_options import GrammarOptions
from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.sampling import Grammar, Sampling


@Parameter(name="*", group="One prompt")
@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """One prompt, whose answer is printed."""

    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None
    """The prompt; `-` reads it from stdin."""

    chat: bool = False
    """Put the prompt to the model as a user's message, by its chat template."""

    stream: bool = False
    """Print the answer while it comes."""


@Parameter(name="*", group="A file of prompts")
@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """A file of prompts, and the file of its answers."""

    input: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None
    """JSON lines with `prompt` or `messages`, or an OpenAI batch file; `-` is stdin."""

    output: Path | None = None
    """Where the answers go, as JSON lines in order of completion; stdout unless given."""

    force: bool = False
    """Overwrite the output."""

    resume: bool = False
    """Keep the answers that the output holds, and ask the others."""


@Parameter(name="*", group="How to answer")
@dataclass(frozen=True, kw_only=True)
class RunSamplingOptions:
    """Sampling of every answer. A line of an input file may override each option."""

    max_tokens: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    """The longest answer, in tokens [default: 128]."""

    temperature: Annotated[float | None, Parameter(validator=Number(gte=0, lte=100))] = None
    """0 always takes the likeliest token [default: 0]."""

    seed: int | None = None
    """Makes an answer with a temperature repeatable."""

    grammar: Annotated[Grammar | None, Parameter(parse=False)] = None
    """The grammar that every answer follows: see `bound_by`."""

    @property
    def given(self) -> dict[str, Any]:
        """The options that the user gave."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def sampling(self) -> Sampling:
        return Sampling(**self.given)

    def bound_by(self, options: GrammarOptions) -> "RunSamplingOptions":
        """These options with the grammar that the user gave. Raises Failure for a wrong one."""
        if (named := options.named) is None:
            return self
        option, grammar = named
        try:
            check_grammar(grammar)
        except GrammarError as error:
            raise Failure(str(error), "correct it", option) from None
        return replace(self, grammar=grammar)


def check_run_options(prompt_options: PromptOptions, files: FileOptions) -> None:
    """Raise Failure for options that contradict each other or would have no effect."""
    if (prompt_options.prompt is None) == (files.input is None):
        raise Failure("give either --prompt or --input", 'for example --prompt "Hello"')
    if prompt_options.prompt is not None:
        _refuse(prompt_options.prompt, "--prompt", files, ("output", "force", "resume"))
    else:
        _refuse(files.input, "--input", prompt_options, ("chat", "stream"))
    if files.force and files.resume:
        raise Failure("--force and --resume contradict each other", "give one of them")
    if files.output is None and (files.force or files.resume):
        raise Failure("--force and --resume need a file", "add --output FILE")


def _refuse(chosen: object, option: str, options: object, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(options, name):
            raise Failure(f"--{name} does not go with {option}", f"leave --{name} out")
