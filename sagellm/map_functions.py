"""The functions of the shipped graph `map`, as an example for users.

The graph's key `imports` names this module. Importing the module registers the functions.
"""

from sagellm.extensions import function
from sagellm.runtime.messages import Answer, Request


@function
def rewrite_prompt(request: Request) -> str:
    """The prompt for the model: each tab becomes four spaces."""
    return request.prompt.replace("\t", "    ")


@function
def read_answer(answer: Answer) -> str:
    """The text for the caller, without white space at its ends."""
    return answer.text.strip()
