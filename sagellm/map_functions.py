"""The functions of the shipped graph `map`, which imports this module: an example to copy."""

from sagellm.extensions import function
from sagellm.runtime.messages import Answer, Request


@function
def rewrite_prompt(request: Request) -> str:
    """The prompt that the model sees: each tab becomes four spaces."""
    return request.prompt.replace("\t", "    ")


@function
def read_answer(answer: Answer) -> str:
    """The answer that the caller gets: without blanks and empty lines around it."""
    return answer.text.strip()
