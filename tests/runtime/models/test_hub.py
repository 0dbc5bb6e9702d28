"""Downloads: only the needed files, and one error type for all failures."""

import errno

import huggingface_hub
import pytest
from httpx2 import Request, Response
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from sagellm.runtime.models.folder import HubError, download


def test_code_and_pickles_are_not_downloaded(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert download("owner/name") == tmp_path
    files = ["model.py", "pytorch_model.bin", "model.safetensors", "tokenizer.json"]
    assert asked.pop("revision") is None
    kept = huggingface_hub.utils.filter_repo_objects(files, **asked)
    assert list(kept) == ["model.safetensors", "tokenizer.json"]


def refusal(kind, status):
    """An error as the Hub's client makes it of an answer."""
    return kind("no", response=Response(status, request=Request("GET", "http://hub.invalid")))


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (LocalEntryNotFoundError("offline"), "cannot be reached"),
        (refusal(GatedRepoError, 403), "gated; accept its licence.*HF_TOKEN"),
        (refusal(RepositoryNotFoundError, 401), "no such model, or it is private.*HF_TOKEN"),
        (refusal(HfHubHTTPError, 500), "answered 500; try again"),
        (OSError(errno.ENOSPC, "full"), "disk is full at /.*HF_HOME"),
        (PermissionError(errno.EACCES, "no"), "cannot be written to; set HF_HOME"),
        (OSError("disk"), "OSError"),
        (ValueError("bad id"), "ValueError"),
    ],
)
def test_every_failure_is_a_hub_error(monkeypatch, raised, reason):
    def snapshot_download(name, **options):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(HubError, match=reason):
        download("owner/name")
