"""Tokenizers and chat templates work as in transformers; errors name the cause."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from models_on_the_fly import EOS, VOCAB_SIZE, make_model
from transformers import AutoTokenizer

from sagellm.runtime.models.chat import ChatTemplate, ChatTemplateError
from sagellm.runtime.models.folder import ModelError, resolve_model
from sagellm.runtime.models.tokenizer import ByteTokenizer, load_tokenizer

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "größe? 😀"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tokenizer(made):
    return load_tokenizer(resolve_model(str(made)))


@pytest.fixture
def model(made, tmp_path):
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(path):
    return load_tokenizer(resolve_model(str(path)))


def configure(model, **changes):
    (model / "tokenizer_config.json").write_text(json.dumps(changes))


@given(text=st.text(max_size=40))
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_shown_on_demand(tokenizer):
    assert tokenizer.decode([EOS]) == ""
    assert tokenizer.decode([EOS], skip_special_tokens=False) == "<|eos|>"
    assert tokenizer.eos_token_ids == (EOS,)
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_chat_is_rendered_with_an_opening_for_the_answer(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES)
    assert text == "<system>be brief</><user>größe? 😀</><assistant>"
    assert tokenizer.decode(tokenizer.encode_chat(MESSAGES)) == text


def test_sage_tiny_is_tokenized_as_by_transformers():
    folder = resolve_model("sage-tiny")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder.path)
    right = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert ours.apply_chat_template(MESSAGES) == right
    assert list(ours.encode_chat(MESSAGES)) == theirs(right, add_special_tokens=False).input_ids
    assert list(ours.encode("2 + 2")) == theirs("2 + 2").input_ids


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_a_long_text_has_the_tokens_of_transformers(add_special_tokens):
    text = "What is 23 + 45? \u00e9\u6a21 <|im_end|>\n" * 500
    assert len(text) > 4096
    wanted = AutoTokenizer.from_pretrained(resolve_model("sage-tiny").path)
    ours = load_tokenizer(resolve_model("sage-tiny"))
    right = wanted(text, add_special_tokens=add_special_tokens)["input_ids"]
    assert ours.encode(text, add_special_tokens=add_special_tokens) == tuple(right)


def test_a_template_file_comes_first(model):
    (model / "chat_template.jinja").write_text("{{ messages[0].content }} {{ eos_token }}")
    assert load(model).apply_chat_template(MESSAGES) == "be brief <|eos|>"


def test_the_default_of_several_templates(model):
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    configure(model, chat_template=templates, eos_token={"content": "<|eos|>"})
    assert load(model).apply_chat_template(MESSAGES) == "d"


def test_templates_without_a_name_are_passed_over(model):
    configure(model, chat_template=["x", {"name": "default", "template": "d"}])
    assert load(model).apply_chat_template(MESSAGES) == "d"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", b'{"a": "\xff"}'),
        ("tokenizer_config.json", b'{"a": ' + b"[" * 100_000),
        ("chat_template.jinja", b"\xff"),
        ("config.json", b'{"a": "\xff"}'),
        ("config.json", b'{"a": ' + b"[" * 100_000),
    ],
)
def test_a_file_that_is_no_text_is_named(model, file, content):
    (model / file).write_bytes(content)
    with pytest.raises(ModelError, match=file):
        load(model)


def test_without_a_template_chat_is_refused(model):
    configure(model)
    with pytest.raises(ChatTemplateError, match="has no chat template; give a plain prompt"):
        load(model).encode_chat(MESSAGES)


def test_a_tokenizer_is_read_once(model):
    assert load(model) is not None
    kept = load(model)
    assert load(model) is kept


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_is_read_again_where_a_file_has_changed(model, file):
    kept = load(model)
    (model / "new").write_text("{}" if file == "tokenizer_config.json" else "changed")
    if file == "tokenizer.json":
        (model / "new").write_bytes((model / file).read_bytes() + b" ")
    (model / "new").replace(model / file)
    assert load(model) is not kept


def test_other_ends_of_text_make_another_tokenizer(model):
    kept = load(model)
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert load(model).eos_token_ids == (*kept.eos_token_ids, 1, 2)


def test_a_missing_tokenizer_is_named(model):
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        load(model)


def test_a_broken_tokenizer_is_named(model):
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        load(model)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "refused"),
        ("{{ 1 / 0 }}", "refused"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_refusals_of_a_template_are_passed_on(text, reason):
    with pytest.raises(ChatTemplateError, match=reason):
        ChatTemplate(text, {}).render(MESSAGES)


@pytest.mark.parametrize("text", ["{% for %}", "{% for a in b %}" * 30 + "{% endfor %}" * 30])
def test_a_broken_template_is_refused_when_a_chat_is_asked_for(text):
    template = ChatTemplate(text, {})
    with pytest.raises(ChatTemplateError, match="the chat template is broken"):
        template.render(MESSAGES)


def test_a_broken_template_leaves_plain_prompts_alone(model):
    configure(model, chat_template="{% for %}")
    assert load(model).encode("a")


def test_an_empty_conversation_is_refused():
    with pytest.raises(ChatTemplateError, match="at least one message"):
        ChatTemplate("x", {}).render([])


def test_blocks_are_trimmed_and_json_keeps_its_letters():
    text = "  {% if true %}\n{{ messages[0] | tojson }}\n  {% endif %}\n"
    right = '{"role": "user", "content": "größe <b>"}\n'
    assert ChatTemplate(text, {}).render([{"role": "user", "content": "größe <b>"}]) == right


def test_templates_may_ask_the_date_and_leave_loops():
    text = "{{ strftime_now('%Y') }}{% for m in messages %}{% break %}{% endfor %}"
    assert ChatTemplate(text, {}).render(MESSAGES).isdigit()


def test_the_null_model_speaks_bytes():
    tokenizer = load_tokenizer(resolve_model("null"))
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.decode(tokenizer.encode("größe")) == "größe"
    assert tokenizer.encode_chat(MESSAGES)[:6] == tuple(b"system")


def test_bytes_of_tokens_join_to_the_text():
    tokenizer = load_tokenizer(resolve_model("sage-tiny"))
    text = "na\u00efve \N{GRINNING FACE} 2+2"
    token_ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode()
    assert tokenizer.token_bytes(tokenizer.eos_token_ids[0]) == b"<|end|>"
    assert tokenizer.token(10**6) == ""
    assert tokenizer.token_bytes(10**6) == b""


def test_bytes_of_tokens_as_sentencepiece_spells_them(model):
    vocab = [["<unk>", 0.0], ["<0xE2>", -1.0], ["\u2581hi", -1.0], ["\u00e9", -1.0]]
    spelt = tokenizers.Tokenizer(tokenizers.models.Unigram([tuple(one) for one in vocab], 0, True))
    spelt.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
    )
    spelt.save(str(model / "tokenizer.json"))
    tokenizer = load(model)
    assert [tokenizer.token_bytes(token) for token in (1, 2, 3)] == [
        b"\xe2",
        b" hi",
        "\u00e9".encode(),
    ]
