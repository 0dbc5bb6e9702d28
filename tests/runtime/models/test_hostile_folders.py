"""No folder exhausts this process: hostile work ends in a helper process."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from hostile_folders import HEALTHY, MESSAGES, TEMPLATES, TOKENIZERS, hostile_folder, load

from sagellm.graphs.models import UnsupportedModel
from sagellm.runtime.models import TextError, isolated
from sagellm.runtime.models.chat import MAX_TEMPLATE_BYTES, Rendering
from sagellm.runtime.models.folder import ModelError, resolve_model
from sagellm.runtime.models.tokenizer import bad_words_token_ids
from sagellm.session.requests import RequestError, encode

MAX_GROWTH_MB = 64
MAX_CPU_S = 0.2  # of this process: its helpers' time is theirs


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _unharmed(work: Any) -> None:
    """This process neither grows nor computes while `work` is refused."""
    peak_mb, began_s = _peak_mb(), time.process_time()
    with pytest.raises(TextError):
        work()
    assert _peak_mb() - peak_mb < MAX_GROWTH_MB
    assert time.process_time() - began_s < MAX_CPU_S


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_is_refused_within_its_limits(tmp_path: Path, template: str) -> None:
    tokenizer = load(hostile_folder(tmp_path, template))
    with tokenizer.kept():
        _unharmed(lambda: tokenizer.apply_chat_template(MESSAGES))
        assert tokenizer.encode("hey")  # plain prompts are served


@pytest.mark.parametrize("parts", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_is_refused_within_its_limits(tmp_path: Path, parts: dict[str, Any]) -> None:
    tokenizer = load(hostile_folder(tmp_path, tokenizer=parts))
    with tokenizer.kept():
        _unharmed(lambda: tokenizer.encode("a" * 3000))
        assert tokenizer.decode([104, 105]) == "hi"


def test_names_of_a_template_that_exhausts_its_compiler_are_not_known(tmp_path: Path) -> None:
    tokenizer = load(hostile_folder(tmp_path, "{{ x }}{{ range(9 ** 9) | list | length }}"))
    with tokenizer.kept():
        assert tokenizer.chat_variables <= {"x"}


def test_a_caller_in_the_same_program_is_told_the_cause(tmp_path: Path) -> None:
    tokenizer = load(hostile_folder(tmp_path, TEMPLATES["loops"]))
    with tokenizer.kept(), pytest.raises(RequestError, match=r"more than 0\.25 s of CPU time"):
        encode(tokenizer, MESSAGES)


@pytest.mark.parametrize("value", ["a", 10**30, -0.5, None, True, {"a": [1]}, "\N{SNOWMAN}"])
def test_a_helper_renders_what_this_process_would(tmp_path: Path, value: object) -> None:
    """Each value has a folder of its own, with an unknown template."""
    template = (
        "{% for m in messages %}{{ m.content }}{{ m.x }}{{ m.x | tojson }}{% endfor %}{{ k }}"
    )
    tokenizer = load(hostile_folder(tmp_path, template))
    how = Rendering(variables={"k": 7}, tools=({"type": "function"},))
    with tokenizer.kept():
        text = tokenizer.apply_chat_template([{"content": "c", "x": value}], how)
        assert text == f"c{value}{json.dumps(value, ensure_ascii=False)}7"
        assert tokenizer.chat_variables == {"k"}


def test_a_helper_encodes_what_this_process_would(tmp_path: Path) -> None:
    parts = {"pre_tokenizer": {**TOKENIZERS["regex"]["pre_tokenizer"], "pattern": {"Regex": "h"}}}
    apart, plain = load(hostile_folder(tmp_path, tokenizer=parts)), load(Path("sage-tiny"))
    assert apart.isolated_encoder
    assert not apart.isolated_encoder.sandbox.pids  # until a text is encoded
    assert not plain.isolated_encoder
    with apart.kept():
        assert apart.encode("hey") == (104, 101, 121)
        assert bad_words_token_ids(apart, [" a", "b"]) == bad_words_token_ids(plain, [" a", "b"])


def test_the_shipped_model_needs_no_helper() -> None:
    tokenizer = load(Path("sage-tiny"))
    assert (tokenizer.isolated_template, tokenizer.isolated_encoder) == (None, None)


def test_a_lone_surrogate_of_a_caller_is_refused(tmp_path: Path) -> None:
    tokenizer = load(hostile_folder(tmp_path, HEALTHY, TOKENIZERS["regex"]))
    with tokenizer.kept():
        for prompt in ("\ud800", [{"role": "user", "content": "\ud800"}]):
            with pytest.raises(RequestError, match="not Unicode"):
                encode(tokenizer, prompt)


def test_messages_that_are_not_json_are_refused(tmp_path: Path) -> None:
    tokenizer = load(hostile_folder(tmp_path, HEALTHY))
    with pytest.raises(TextError, match="object has no JSON form"):
        tokenizer.apply_chat_template([{"role": "user", "content": object()}])


GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
DECODERS = [
    GROWS,
    {"type": "Sequence", "decoders": [{**GROWS, "content": "a" * 9}] * 3},
    {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": ""},
    {"type": "Strip", "content": " ", "start": 0, "stop": 9},
]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_that_multiplies_is_not_loaded(tmp_path: Path, decoder: object) -> None:
    with pytest.raises(ModelError, match=r"decoder of tokenizer\.json may multiply"):
        load(hostile_folder(tmp_path, tokenizer={"decoder": decoder}))


def test_tokens_of_any_length_are_not_loaded(tmp_path: Path) -> None:
    folder = hostile_folder(tmp_path)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "a" * 5000))
    with pytest.raises(ModelError, match="has a token of 5000 characters"):
        load(folder)


def test_added_tokens_that_grow_as_they_are_read_are_refused(tmp_path: Path) -> None:
    folder = hostile_folder(tmp_path, tokenizer=TOKENIZERS["replace"])
    file = folder / "tokenizer.json"
    held = json.loads(file.read_text())
    held["added_tokens"].append({**held["added_tokens"][0], "id": 258, "content": "a" * 4000})
    held["added_tokens"][-1]["normalized"] = True
    file.write_text(json.dumps(held))
    peak_mb = _peak_mb()
    with pytest.raises(ModelError, match="cannot be read: it took more than"):
        load(folder)
    assert _peak_mb() - peak_mb < MAX_GROWTH_MB


def test_a_regular_expression_that_compiles_to_gigabytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "_LOAD_CPU_S", 0.1)
    pattern = "(?i:" + "[\\p{L}\\p{N}]" * 20_000 + ")"  # 1.7 GB once compiled, and 20 s
    parts = {**TOKENIZERS["regex"]["pre_tokenizer"], "pattern": {"Regex": pattern}}
    folder = hostile_folder(tmp_path, tokenizer={"pre_tokenizer": parts})
    peak_mb, began_s = _peak_mb(), time.process_time()
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read: it took more than"):
        load(folder)
    assert _peak_mb() - peak_mb < MAX_GROWTH_MB
    assert time.process_time() - began_s < MAX_CPU_S


def test_a_tokenizer_that_no_helper_can_load_is_refused(tmp_path: Path) -> None:
    parts = {**TOKENIZERS["regex"]["pre_tokenizer"], "pattern": {"Regex": "("}}
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read: Oniguruma"):
        load(hostile_folder(tmp_path, tokenizer={"pre_tokenizer": parts}))


def test_options_of_any_length_are_not_taken(tmp_path: Path) -> None:
    """A helper process gets them before it reads: a call must not wait for that."""
    folder = hostile_folder(tmp_path, HEALTHY)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "a" * 10**6}))
    with pytest.raises(ModelError, match=r"set up with 1000\d\d\d bytes"):
        load(folder)


def test_an_error_repeats_the_beginning_of_a_long_value(tmp_path: Path) -> None:
    folder = hostile_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": ["a"] * 10**5}))
    with pytest.raises(UnsupportedModel) as refused:
        resolve_model(str(folder))
    assert len(str(refused.value)) < 1000


def test_a_template_of_any_length_is_not_read(tmp_path: Path) -> None:
    folder = hostile_folder(tmp_path, "a" * (MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(ModelError, match="at most 131072 are read"):
        load(folder)


@pytest.mark.parametrize(
    ("layers", "error", "cause"),
    [
        (10**9, UnsupportedModel, "num_hidden_layers: 1000000000 layers are more than any model"),
        (10**30, UnsupportedModel, "more than any model has"),
        (4096, ModelError, "config.json has 4096 layers .* the folder only 5. tensors"),
    ],
)
def test_layers_without_tensors_are_refused_before_a_graph_is_built(
    tmp_path: Path, layers: int, error: type[Exception], cause: str
) -> None:
    folder = hostile_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    peak_mb, began_s = _peak_mb(), time.process_time()
    with pytest.raises(error, match=cause):
        resolve_model(str(folder))
    assert _peak_mb() - peak_mb < MAX_GROWTH_MB
    assert time.process_time() - began_s < MAX_CPU_S
