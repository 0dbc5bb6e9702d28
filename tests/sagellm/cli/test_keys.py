"""The sources of keys, invalid keys, and usable certificates."""

from pathlib import Path

import pytest
from tls_pairs import tls_pair

from sagellm.cli.config_file import ConfigFile, KeyTable
from sagellm.cli.errors import Failure
from sagellm.cli.keys import admin_key, check_tls, read_keys, readable_secrets, salt_key, user_keys

SALT = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAGELLM_API_KEY", "SAGELLM_ADMIN_KEY", "SAGELLM_SALT_KEY", "TEAM"):
        monkeypatch.delenv(name, raising=False)


def keyed(**table: object) -> ConfigFile:
    return ConfigFile(keys={"team": KeyTable(**table, where="serve.toml:3")})  # type: ignore[arg-type]


def test_keys_have_names() -> None:
    assert read_keys(["alice=s3cret", "plain", "YWJj=="]) == {
        "alice": "s3cret",
        "key-2": "plain",
        "key-3": "YWJj==",
    }


@pytest.mark.parametrize("given", ["", "a=b c", "admin=x", "a b=x", "a=\x01"])
def test_a_key_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(Failure):
        read_keys([given])


def test_a_name_is_given_once() -> None:
    with pytest.raises(Failure):
        read_keys(["a=x", "a=y"])


def test_the_command_line_wins_over_the_file_and_that_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clients read the same variable: it must not replace the keys of a file."""
    monkeypatch.setenv("SAGELLM_API_KEY", "alice=from-outside")
    assert user_keys((), ConfigFile()) == {"alice": "from-outside"}
    assert user_keys((), keyed(key="k")) == {"team": "k"}
    assert user_keys(("b=x",), keyed(key="k")) == {"b": "x"}


def test_a_key_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("from-a-file\n")
    assert user_keys((), keyed(key_file=file)) == {"team": "from-a-file"}
    monkeypatch.setenv("TEAM", "from-outside")
    assert user_keys((), keyed(key_env="TEAM")) == {"team": "from-outside"}


@pytest.mark.parametrize("content", ["", "two words", "a\nb", "x" * 5000])
def test_a_file_without_a_key_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    with pytest.raises(Failure, match="holds no key") as caught:
        user_keys((), keyed(key_file=file))
    assert caught.value.where == str(file)


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(Failure, match="no TEAM") as caught:
        user_keys((), keyed(key_env="TEAM"))
    assert (caught.value.fix, caught.value.where) == ("export TEAM=KEY", "serve.toml:3")


def test_the_name_admin_is_no_tenants() -> None:
    with pytest.raises(Failure, match="cannot be taken"):
        user_keys((), ConfigFile(keys={"admin": KeyTable(key="k")}))


def test_the_admin_key_has_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("root")
    monkeypatch.setenv("SAGELLM_ADMIN_KEY", "outside")
    assert admin_key("given", None) == "given"
    assert admin_key(None, file) == "root"
    assert admin_key(None, None) == "outside"
    with pytest.raises(Failure, match="twice"):
        admin_key("given", file)


def test_a_salt_key_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "salt"
    file.write_text("short")
    with pytest.raises(Failure, match="16 bytes"):
        salt_key(file)
    file.write_text(SALT)
    assert salt_key(file) == SALT.encode()
    assert salt_key(None) == b""
    monkeypatch.setenv("SAGELLM_SALT_KEY", SALT[::-1])
    assert salt_key(None) == SALT[::-1].encode()


def test_a_pair_that_tls_can_be_served_with(tmp_path: Path) -> None:
    check_tls(None, None)
    check_tls(*tls_pair(tmp_path))


def test_half_of_a_pair_is_not_served_in_the_clear(tmp_path: Path) -> None:
    certificate, key = tls_pair(tmp_path)
    with pytest.raises(Failure, match="both") as caught:
        check_tls(certificate, None)
    assert "--tls-key" in caught.value.fix
    with pytest.raises(Failure, match="both"):
        check_tls(None, key)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    certificate, _ = tls_pair(tmp_path)
    _, other = tls_pair(tmp_path / "other")
    with pytest.raises(Failure, match="does not belong"):
        check_tls(certificate, other)


def test_files_that_no_tls_can_be_served_with(tmp_path: Path) -> None:
    certificate, key = tls_pair(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_tls(certificate, tmp_path / "none.pem")
    with pytest.raises(Failure, match="PEM"):
        check_tls(key, key)
    certificate, key = tls_pair(tmp_path, passphrase="secret")
    with pytest.raises(Failure, match="passphrase"):  # OpenSSL must not ask on the terminal
        check_tls(certificate, key)


def test_files_that_others_may_read_are_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.touch(0o600)
    config = keyed(key_file=file)
    assert list(readable_secrets(config, (None, file))) == []
    file.chmod(0o640)
    (warning,) = readable_secrets(config, (None, file))
    assert f"chmod 600 {file}" in warning


def test_a_file_of_settings_with_keys_is_one_of_them(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.touch(0o644)
    assert list(readable_secrets(ConfigFile(path=file), ())) == []
    assert len(list(readable_secrets(ConfigFile({"admin_key": "a"}, path=file), ()))) == 1
    literal = ConfigFile(keys={"a": KeyTable(key="k")}, path=file)
    assert len(list(readable_secrets(literal, ()))) == 1
