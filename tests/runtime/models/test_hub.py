"""Downloads: only what is needed, and one error whatever fails."""

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from sagellm.runtime.models.hub import HubError, download


def test_code_and_pickles_are_not_downloaded(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert download("owner/name") == tmp_path
    files = ["model.py", "pytorch_model.bin", "model.safetensors", "tokenizer.json"]
    kept = huggingface_hub.utils.filter_repo_objects(files, **asked)
    assert list(kept) == ["model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (LocalEntryNotFoundError("offline"), "cannot be reached"),
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
