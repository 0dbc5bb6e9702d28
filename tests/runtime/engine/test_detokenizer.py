"""Incremental text: whole characters only, and in sum the text of all tokens."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from models_on_the_fly import EOS, VOCAB_SIZE, byte_tokenizer
from tokenizers import decoders, models

from sagellm.runtime.engine.output import IncrementalDetokenizer

FAMILY = "👩‍👩‍👧"


def sentencepiece_tokenizer():
    """A tokenizer like Llama 2's: a leading bar for a space, bytes for other characters."""
    pieces = ["▁", "▁the", "▁a", "t", "h", "e", "s", "<unk>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    vocab |= {f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer


SENTENCEPIECE = sentencepiece_tokenizer()


PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]


def byte_id(byte):
    """The token of one byte. Byte-level BPE writes unprintable bytes as letters from 256 on."""
    letter = chr(byte if byte in PRINTABLE else 256 + OTHERS.index(byte))
    return byte_tokenizer().token_to_id(letter)


def stream(tokenizer, token_ids, skip_special_tokens=True):
    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    detokenizer = IncrementalDetokenizer(decode)
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


def test_half_an_emoji_is_held_back():
    ids = byte_tokenizer().encode("a😀b").ids
    parts = stream(byte_tokenizer(), ids)
    assert "".join(parts) == "a😀b"
    assert [part for part in parts if part] == ["a", "😀", "b"]


def test_broken_bytes_come_out_at_the_end():
    ids = byte_tokenizer().encode("a" + FAMILY).ids[:-1]
    parts = stream(byte_tokenizer(), ids)
    assert "".join(parts) == byte_tokenizer().decode(ids)
    assert parts[-1].endswith("�")


def test_special_tokens_are_skipped_unless_wanted():
    ids = [*byte_tokenizer().encode("a").ids, EOS, *byte_tokenizer().encode(" b").ids]
    assert "".join(stream(byte_tokenizer(), ids)) == "a b"
    assert "".join(stream(byte_tokenizer(), ids, skip_special_tokens=False)) == "a<|eos|> b"


@given(st.text(max_size=30))
def test_streamed_text_is_the_text(text):
    ids = byte_tokenizer().encode(text).ids
    parts = stream(byte_tokenizer(), ids)
    assert "".join(parts) == text
    assert all("�" not in part for part in parts) or "�" in text


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40))
def test_any_tokens_stream_to_their_decoding(ids):
    assert "".join(stream(byte_tokenizer(), ids)) == byte_tokenizer().decode(ids)


@pytest.mark.parametrize("ids", [[EOS], [0x80], [0xE2, 0x82], [EOS, 0xFF], [0xEF, 0xBF, 0xBD]])
@pytest.mark.parametrize("rest", [[], [0xE2, 0x82, 0xAC]])
def test_the_window_stays_short_whatever_comes(ids, rest):
    tokenizer, lengths = byte_tokenizer(), []

    def decode(window):
        lengths.append(len(window))
        return tokenizer.decode(window)

    detokenizer = IncrementalDetokenizer(decode)
    tokens = [one if one == EOS else byte_id(one) for one in [0x61, *ids * 100, *rest]]
    parts = [*map(detokenizer.push, tokens), detokenizer.flush()]
    assert max(lengths) <= 32
    assert "".join(parts) == tokenizer.decode(tokens)


def test_sentencepiece_keeps_replacement_characters():
    ids = [SENTENCEPIECE.token_to_id("▁"), *[8 + byte for byte in "�".encode() * 20]]
    assert "".join(stream(SENTENCEPIECE, ids)) == SENTENCEPIECE.decode(ids) == "�" * 20


@given(
    st.lists(st.sampled_from([EOS, 0x61, 0x80, 0xF0, 0x9F, 0xE2, 0xBF, 0xBD, 0xEF]), max_size=99)
)
def test_broken_bytes_stream_to_their_decoding(ids):
    tokens = [one if one == EOS else byte_id(one) for one in ids]
    assert "".join(stream(byte_tokenizer(), tokens)) == byte_tokenizer().decode(tokens)


def test_sentencepiece_keeps_its_spaces():
    ids = [SENTENCEPIECE.token_to_id(piece) for piece in ("▁the", "▁a", "▁", "▁the", "s")]
    assert "".join(stream(SENTENCEPIECE, ids)) == SENTENCEPIECE.decode(ids) == "the a  thes"


PIECES = st.one_of(st.sampled_from(["▁the", "▁a", "▁", "s"]), st.characters(codec="utf-8"))


@given(st.lists(PIECES, max_size=20))
def test_sentencepiece_streams_pieces_and_bytes(pieces):
    ids = []
    for piece in pieces:
        known = SENTENCEPIECE.token_to_id(piece)
        encoded = piece.encode("utf-8", errors="replace")
        ids += [8 + byte for byte in encoded] if known is None else [known]
    parts = stream(SENTENCEPIECE, ids)
    assert "".join(parts) == SENTENCEPIECE.decode(ids)
