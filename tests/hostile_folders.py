"""Model folders whose templates and tokenizers try to exhaust the process that uses them."""

import json
import shutil
from pathlib import Path
from typing import Any

from sagellm.runtime.models.folder import BUILT_IN, resolve_model
from sagellm.runtime.models.tokenizer import Tokenizer, load_tokenizer

MESSAGES = [{"role": "user", "content": "hey"}]
HEALTHY = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"

_DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}"
_REPLACED = "{% for i in range(12) %}{% set ns.x = ns.x.replace('a', 'a' * 10) %}{% endfor %}"

# Templates that multiply texts or lists, take time, or raise errors that are not Jinja's.
TEMPLATES = {
    "mul": "{{ messages[0].content * 9999999999 }}",
    "long": "{{ 'a' * 6000000 }}",
    "mul of constants": "{{ 'a' * 9999999999 }}",
    "mul of a list": "{{ [1] * 9999999999 }}",
    "slice": _DOUBLED.replace("START", "[1, 2, 3]") + "{% endfor %}{{ ns.x | slice(3) | list }}",
    "replace": "{% set ns = namespace(x='a') %}" + _REPLACED + "{{ ns.x }}",
    "indent": "{{ ('a\n' * 1000) | indent(99999999) }}",
    "center": "{{ messages[0].content | center(8000000000) }}",
    "format": "{{ '%8000000000s' | format(messages[0].content) }}",
    "format method": "{{ '{:>8000000000}'.format(messages[0].content) }}",
    "join": "{{ range(99999) | join('a' * 999999) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ ((messages | length + 8) ** 99999999) | length }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "depth": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "an attribute": "{{ '{0.no_such}'.format(messages) }}{{ messages.x.y }}",
    "a surrogate": "{{ '\\ud800' }}",
}


def _regex(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*normalizers: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": normalizers}


def _replace(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


_TEXT = {"Sequence": {"id": "A", "type_id": 0}}
_SPECIAL = {"SpecialToken": {"id": "x", "type_id": 0}}

TOKENIZERS: dict[str, dict[str, Any]] = {
    "prepend": {"normalizer": _sequence(*[{"type": "Prepend", "prepend": "ab" * 10**5}] * 12)},
    "replace": {"normalizer": _sequence(*[_replace("a" * 100)] * 5)},
    "template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*[_SPECIAL] * 5000, _TEXT],
            "pair": [_TEXT, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"x": {"id": "x", "ids": [1] * 5000, "tokens": ["x"] * 5000}},
        }
    },
    "regex": {"pre_tokenizer": _regex("(a+)+b")},
}


def hostile_folder(
    path: Path, template: str | None = None, tokenizer: dict[str, Any] | None = None
) -> Path:
    """A copy of sage-tiny with that template, and those parts of tokenizer.json."""
    folder = Path(shutil.copytree(BUILT_IN["sage-tiny"], path / "model"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if tokenizer is not None:
        file = folder / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **tokenizer}))
    return folder


def load(folder: Path) -> Tokenizer:
    return load_tokenizer(resolve_model(str(folder)))
