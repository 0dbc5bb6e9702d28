"""`sagellm keys`; and reads the keys of `serve` from options, files and the environment."""

import os
import re
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path

from sagellm.cli.config_file import ConfigFile, KeyTable
from sagellm.cli.errors import Failure
from sagellm.runtime.comm.keys import create_keys

API_KEY_VARIABLE = "SAGELLM_API_KEY"
ADMIN_KEY_VARIABLE = "SAGELLM_ADMIN_KEY"
SALT_KEY_VARIABLE = "SAGELLM_SALT_KEY"
MAX_KEY_BYTES = 4096
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NAME_FIX = "letters, digits, . _ - ; each name once; not admin, anonymous or probe"
_RESERVED_NAMES = frozenset({"admin", "anonymous", "probe"})  # tenants that the gateway itself uses


def keys(folder: Path, /) -> int:
    """Make the CURVE keys of a graph and its workers, in a new folder that only you can enter.

    Parameters
    ----------
    folder
        The new folder for the keys; pass it as `executor.keys`, with a tcp address as
        `executor.address`.
    """
    try:
        create_keys(folder)
    except FileExistsError:
        raise Failure(
            f"{folder} is there already", "name another folder: keys that are in use are not lost"
        ) from None
    print(f"--set executor.keys={folder.absolute()} --set executor.address=tcp://127.0.0.1:0")
    return 0


def user_keys(given: Sequence[str], config: ConfigFile) -> dict[str, str]:
    """The API keys by name, from the command line, or else the file, or else the environment.

    Raises Failure.
    """
    if given:
        return read_keys(given)
    if config.keys:
        return {name: _key_of(name, table) for name, table in config.keys.items()}
    return read_keys(_from_environment(API_KEY_VARIABLE))


def read_keys(given: Sequence[str]) -> dict[str, str]:
    """Parse texts KEY or NAME=KEY into name -> key. KEY number N is named `key-N`.

    Raises Failure.
    """
    keys: dict[str, str] = {}
    for number, text in enumerate(given, 1):
        name, _, key = text.partition("=")
        if not key.strip("="):  # no name: the "=" is padding at the end of a base64 key
            name, key = f"key-{number}", text
        if not _is_key(key):
            raise Failure("an API key is empty or has blanks", "give --api-key KEY or NAME=KEY")
        if not _is_name(name) or name in keys:
            raise Failure("the name of an API key cannot be taken", _NAME_FIX, "--api-key NAME=KEY")
        keys[name] = key
    return keys


def _is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name not in _RESERVED_NAMES


def _is_key(key: str) -> bool:
    return bool(key) and key.isprintable() and " " not in key


def _key_of(name: str, table: KeyTable) -> str:
    if not _is_name(name):
        raise Failure("the name of an API key cannot be taken", _NAME_FIX, table.where)
    key = table.key
    if table.key_env:
        key = os.environ.get(table.key_env, "")
        if not key:
            cause = f"the environment has no {table.key_env}, which holds the key {name}"
            raise Failure(cause, f"export {table.key_env}=KEY", table.where)
    if table.key_file is not None:
        key = _from_file(table.key_file)
    if not _is_key(key):
        raise Failure(f"the key {name} is empty or has blanks", "one word a key", table.where)
    return key


def admin_key(given: str | None, file: Path | None) -> str | None:
    """The admin key from the command line, `file` or the environment; None without one.

    Raises Failure, also for a key both on the command line and in a file.
    """
    if given is not None and file is not None:
        raise Failure("the admin key is given twice", "leave --admin-key or --admin-key-file out")
    key = given or (
        _from_file(file) if file else next(iter(_from_environment(ADMIN_KEY_VARIABLE)), None)
    )
    if key is not None and not _is_key(key):
        raise Failure("the admin key is empty or has blanks", "give one word", "--admin-key")
    return key


def salt_key(file: Path | None) -> bytes:
    """The salt key from `file`, or else from the environment, or else empty.

    For an empty key, the gateway makes a random one. Raises Failure for fewer than 16 bytes.
    """
    key = _from_file(file) if file else next(iter(_from_environment(SALT_KEY_VARIABLE)), "")
    if key and len(key.encode()) < 16:
        fix = "for example: openssl rand -hex 32"
        raise Failure("the salt key is shorter than 16 bytes", fix, str(file or SALT_KEY_VARIABLE))
    return key.encode()


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Check a TLS certificate and its key. Raises Failure if one is missing or unusable.

    Raises OSError for a file that cannot be read.
    """
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        missing = "--tls-key" if key is None else "--tls-certificate"
        raise Failure("TLS needs both a certificate and its key", f"add {missing} FILE.pem")
    for file in (certificate, key):
        with file.open("rb"):  # errors of the ssl module do not name the file
            pass
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except _Encrypted:
        fix = "decrypt it: openssl pkey -in KEY.pem -out PLAIN.pem"
        raise Failure("the TLS key has a passphrase", fix, str(key)) from None
    except ssl.SSLError as error:
        raise _tls_failure(error, certificate, key) from None


class _Encrypted(Exception):
    pass


def _no_passphrase() -> str:
    """Raise _Encrypted. Without this callback, OpenSSL would ask for a passphrase, and block."""
    raise _Encrypted


def _tls_failure(error: ssl.SSLError, certificate: Path, key: Path) -> Failure:
    if error.reason == "KEY_VALUES_MISMATCH":
        cause = "the TLS key does not belong to the certificate"
        return Failure(cause, f"give the key that {certificate} was made with", str(key))
    fix = "give PEM files: -----BEGIN CERTIFICATE----- and -----BEGIN PRIVATE KEY-----"
    return Failure("no TLS certificate and key in PEM", fix, f"{certificate}, {key}")


def readable_secrets(config: ConfigFile, files: Sequence[Path | None]) -> Iterator[str]:
    """Yield a warning for each file with secrets that other users of this machine may read."""
    paths = [file for file in files if file is not None]
    paths += [table.key_file for table in config.keys.values() if table.key_file is not None]
    if config.path is not None and _has_keys(config):
        paths.append(config.path)
    for file in dict.fromkeys(paths):
        if file.stat().st_mode & 0o077:
            yield f"{file} holds a key, and other users may read it: chmod 600 {file}"


def _has_keys(config: ConfigFile) -> bool:
    return "admin_key" in config.values or any(each.key for each in config.keys.values())


def _from_file(file: Path) -> str:
    """Read the key in a file. Raises Failure for a file without a key, OSError on a read error."""
    with file.open("rb") as opened:
        content = opened.read(MAX_KEY_BYTES + 1)
    key = content.decode(errors="replace").strip()  # invalid UTF-8 makes an invalid key
    if len(content) > MAX_KEY_BYTES or not _is_key(key):
        raise Failure("the file holds no key", "write one word into it, in one line", str(file))
    return key


def _from_environment(name: str) -> tuple[str, ...]:
    value = os.environ.get(name, "")
    return (value,) if value else ()
