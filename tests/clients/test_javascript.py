"""The clients of other projects in JavaScript: each file of tests, run by node.

SAGELLM_NODE_MODULES names the folder in which npm has installed the packages of
javascript/package.json; `make clients` sets it.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

KEY = "sk-of-the-tests"
TESTS = Path(__file__).with_name("javascript")


@pytest.fixture
def folder(tmp_path):
    """A copy of the tests beside their packages, where node looks for them."""
    packages = os.environ.get("SAGELLM_NODE_MODULES")
    if shutil.which("node") is None or packages is None or not Path(packages).is_dir():
        pytest.skip("no node, or no packages: make clients installs them where there is npm")
    for file in TESTS.glob("*.mjs"):
        shutil.copy(file, tmp_path)
    (tmp_path / "node_modules").symlink_to(packages)
    return tmp_path


@pytest.mark.parametrize("name", sorted(file.name for file in TESTS.glob("*.test.mjs")))
def test_a_client(url, folder, name):
    settings = {"SAGELLM_URL": url, "SAGELLM_KEY": KEY, "no_proxy": "*"}
    done = subprocess.run(
        ["node", "--test", name], cwd=folder, capture_output=True, env={**os.environ, **settings}
    )
    assert done.returncode == 0, done.stdout.decode()[-8000:]
