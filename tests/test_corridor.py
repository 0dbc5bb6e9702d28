"""How many modules a streamed chat over HTTP passes."""

import pytest
from corridor import corridor

# Of the whole path, and of the gateway with the session. `python tests/corridor.py` lists them.
MOST_MODULES = 80
MOST_OF_THE_GATEWAY = 23


@pytest.mark.alone
def test_a_streamed_chat_passes_few_modules() -> None:
    modules = corridor()
    own = [name for name in modules if name.startswith(("sagellm.gateway.", "sagellm.session"))]
    assert len(modules) <= MOST_MODULES, modules
    assert len(own) <= MOST_OF_THE_GATEWAY, own


def test_the_ends_of_the_path_are_among_them() -> None:
    modules = corridor()
    assert modules[0].startswith("sagellm.gateway.http")
    assert {"sagellm.session", "sagellm.operators.generate"} <= set(modules)
    assert any(name.startswith("sagellm.backends.") for name in modules)  # in the queue's thread
