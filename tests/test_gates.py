"""Nothing in the tree unpickles, evaluates or hands to a shell what it was given as data."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("sagellm", "graphs", "backends", "runtime", "operators", "benchmarks", "examples")
NAMES = {"eval", "exec", "compile", "__import__"}  # called by themselves
CALLS = {
    *("torch.load", "numpy.load", "np.load", "joblib.load", "yaml.load", "yaml.unsafe_load"),
    *("os.system", "os.popen", "subprocess.getoutput"),
}
METHODS = {"recv_pyobj", "send_pyobj"}
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def test_nothing_is_unpickled_or_evaluated() -> None:
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 200
    assert not {f"{path}: {wrong}" for path in sources for wrong in offences(path.read_text())}


def test_each_offence_is_seen() -> None:
    for text in ("eval('1')", "import pickle", "from dill import loads", "torch.load(f)",
                 "socket.recv_pyobj()", "x = exec('y')", "os.system('ls')"):  # fmt: skip
        assert list(offences(text)), text
    for text in ("model.eval()", "re.compile('x')", "json.loads('1')"):
        assert not list(offences(text)), text


def offences(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                yield from (f"import {one.name}" for one in names if one.name in MODULES)
            case ast.ImportFrom(module=str(module)) if module in MODULES:
                yield f"from {module} import"
            case ast.Call(func=ast.Name(id=name)) if name in NAMES:
                yield name
            case ast.Call(func=ast.Attribute(attr=name) as called):
                if name in METHODS or ast.unparse(called) in CALLS:
                    yield ast.unparse(called)
