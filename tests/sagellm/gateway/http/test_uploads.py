"""Multipart bodies: what is stored, what is refused, and what hostile ones cost."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from stored_batches import TENANT, stores_in

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.batches.file_store import DEFAULT_LIFE_S
from sagellm.gateway.http.uploads import UploadFields, UploadForm, boundary_of, read_upload

BOUNDARY = b"xyz"
Part = tuple[str, bytes]
PURPOSE: Part = ('name="purpose"', b"batch")
FILE: Part = ('name="file"; filename="in.jsonl"', b"content")


def form(*parts: Part, headers: bytes = b"") -> bytes:
    """A multipart body."""
    pieces = [
        b"--xyz\r\nContent-Disposition: form-data; "
        + head.encode("utf-8", "surrogateescape")
        + b"\r\n"
        + headers
        + b"\r\n"
        + content
        + b"\r\n"
        for head, content in parts
    ]
    return b"".join(pieces) + b"--xyz--\r\n"


async def sent(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


async def read(
    folder: Path, body: bytes, *, most: int = 1000, size: int = 1 << 20
) -> tuple[UploadFields, bytes]:
    """The fields and the content of an upload."""
    stores = stores_in(folder)
    upload = stores.files.begin_upload(TENANT, most)
    try:
        read = UploadForm(BOUNDARY, upload, most)
        fields = await read_upload(sent(body, size), read, stores.folder)
        record = upload.commit(fields.filename, fields.life_s)
        with stores.files.open(TENANT, record.id) as file:
            return fields, file.read()
    finally:
        upload.discard()


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("parts", [(FILE, PURPOSE), (PURPOSE, FILE)])
async def test_a_file_is_stored_however_it_comes(
    tmp_path: Path, size: int, parts: Sequence[Part]
) -> None:
    fields, content = await read(tmp_path, form(*parts), size=size)
    assert fields == UploadFields("in.jsonl", DEFAULT_LIFE_S)
    assert content == b"content"


@pytest.mark.parametrize("content", [b"--xyz", b"\r\n--xy", b"\x00\xff", b"\r\n" * 90, b"--xyz--"])
async def test_a_content_that_looks_like_a_boundary_is_kept(tmp_path: Path, content: bytes) -> None:
    name = ('name="file"; filename="a"', content + b"!")
    assert (await read(tmp_path, form(PURPOSE, name), size=3))[1] == content + b"!"


async def test_a_life_may_be_chosen(tmp_path: Path) -> None:
    parts = (
        ('name="expires_after[anchor]"', b"created_at"),
        ('name="expires_after[seconds]"', b"7200"),
    )
    fields, _ = await read(tmp_path, form(PURPOSE, FILE, *parts))
    assert fields.life_s == 7200


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("/abs/x.jsonl", "x.jsonl"),
        ("C:\\\\dir\\\\x.jsonl", "x.jsonl"),
        ("na\u00efve \u2603.jsonl", "na\u00efve \u2603.jsonl"),
    ],
)
async def test_a_name_is_no_path(tmp_path: Path, name: str, shown: str) -> None:
    part = (f'name="file"; filename="{name}"', b"x")
    assert (await read(tmp_path, form(PURPOSE, part)))[0].filename == shown
    assert not [each for each in names(tmp_path) if shown in each]


def field(name: str, value: bytes) -> bytes:
    return form(PURPOSE, FILE, (f'name="{name}"', value))


ANCHOR = ('name="expires_after[anchor]"', b"created_at")
WRONG: list[tuple[bytes, int, str | None]] = [
    (b"", 400, None),
    (b"junk", 400, None),
    (b"--xyz\r\njunk", 400, None),
    (form(PURPOSE, FILE)[:-9], 400, None),  # no last boundary
    (form(FILE), 400, "purpose"),
    (form(('name="purpose"', b"fine-tune"), FILE), 400, "purpose"),
    (form(('name="purpose"', b"\xff"), FILE), 400, "purpose"),
    (form(PURPOSE), 400, "file"),
    (form(PURPOSE, ('name="file"; filename="a"', b"")), 400, "file"),
    (form(PURPOSE, ('name="file"', b"x")), 400, "file"),
    (form(PURPOSE, ('name="file"; filename=""', b"x")), 400, "file"),
    (form(PURPOSE, (f'name="file"; filename="{"x" * 256}"', b"x")), 400, "file"),
    (form(PURPOSE, ('name="file"; filename="a\x00b"', b"x")), 400, None),
    (form(PURPOSE, ('name="file"; filename="a\x7fb"', b"x")), 400, None),
    (form(PURPOSE, ('name="file"; filename="\udcff"', b"x")), 400, "file"),
    (form(PURPOSE, FILE, FILE), 400, "file"),
    (form(PURPOSE, PURPOSE, FILE), 400, "purpose"),
    (field("purpos", b"batch"), 400, None),
    (field("", b"batch"), 400, None),
    (field("expires_after[anchor]", b"created_at"), 400, "expires_after.seconds"),
    (field("expires_after[seconds]", b"7200"), 400, "expires_after.anchor"),
    (form(PURPOSE, FILE, ANCHOR, ('name="expires_after[seconds]"', b"1")), 400, None),
    (form(PURPOSE, FILE, ANCHOR, ('name="expires_after[seconds]"', b"1e9")), 400, None),
    (form(PURPOSE, FILE, ANCHOR, ('name="expires_after[seconds]"', b"9" * 500)), 400, None),
    (form(PURPOSE, FILE, headers=b"Content-Transfer-Encoding: base64\r\n"), 400, None),
    (form(('name="purpose"', b"x" * 600), FILE), 400, "purpose"),
    (form(PURPOSE, ('name="file"; filename="a"', b"x" * 1001)), 413, None),
    (form(*[PURPOSE] * 10_000), 400, "purpose"),
    (form(PURPOSE, FILE, headers=b"X: y\r\n" * 100), 400, None),
    (form(PURPOSE, FILE, headers=b"X: " + b"y" * 10_000 + b"\r\n"), 400, None),
    (form(PURPOSE, FILE, headers=b"X" * 10_000 + b": y\r\n"), 400, None),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
async def test_a_wrong_body_leaves_nothing(tmp_path: Path, number: int) -> None:
    body, status, param = WRONG[number]
    with pytest.raises(ApiError) as error:
        await read(tmp_path, body)
    assert error.value.status == status
    assert param in (None, error.value.param)
    assert [each for each in names(tmp_path) if each.endswith((".part", ".data"))] == []


async def test_an_unknown_field_gets_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="did you mean `purpose`"):
        await read(tmp_path, field("purpos", b"batch"))


@pytest.mark.parametrize(
    "content_type",
    ["", "application/json", "multipart/form-data", "multipart/form-data; boundary="],
)
def test_another_content_type_is_refused(content_type: str) -> None:
    with pytest.raises(ApiError) as error:
        boundary_of(content_type)
    assert error.value.param == "content-type"


def test_a_long_boundary_is_refused(tmp_path: Path) -> None:
    upload: Any = None
    with pytest.raises(ApiError, match="boundary"):
        UploadForm(b"x" * 300, upload, 1)
    assert boundary_of('multipart/form-data; boundary="a b"') == b"a b"
