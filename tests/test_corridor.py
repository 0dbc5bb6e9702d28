"""How many modules a streamed chat over HTTP passes, and which."""

import re

import pytest
from corridor import corridor
from house import MODULES, ROOT, floor_of

# Above the backends, whose modules depend on the CPU; and of the gateway with the session.
MOST_MODULES = 76
MOST_OF_THE_GATEWAY = 24


def above_backends() -> list[str]:
    return [module for module in corridor() if floor_of(module) not in ("backends", "graphs")]


@pytest.mark.alone
def test_a_streamed_chat_passes_few_modules() -> None:
    modules = above_backends()
    own = [name for name in modules if name.startswith(("sagellm.gateway.", "sagellm.session"))]
    assert len(modules) <= MOST_MODULES, modules
    assert len(own) <= MOST_OF_THE_GATEWAY, own


def test_the_ends_of_the_path_are_among_them() -> None:
    modules = corridor()
    assert modules[0].startswith("sagellm.gateway.http")
    assert {"sagellm.session", "sagellm.operators.generate"} <= set(modules)
    assert any(name.startswith("sagellm.backends.") for name in modules)  # in the queue's thread


def test_the_structure_page_has_the_modules_of_the_path() -> None:
    page = (ROOT / "docs" / "structure.md").read_text()
    table = page.split("## The modules of a streamed chat")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w/]+)/` \| (.*) \|$", table, re.M)
    files = {f"{folder}/{name}" for folder, names in rows for name in re.findall(r"`(\w+)`", names)}
    passed = {path_of(module) for module in above_backends()}
    assert {name for name in files if not name.startswith(("backends/", "graphs/"))} == passed


def path_of(module: str) -> str:
    return str(MODULES[module].relative_to(ROOT).with_suffix(""))
