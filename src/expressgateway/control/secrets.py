"""Secrets that workers share and no client knows: what session cookies are signed with, and Retry tokens
encrypted.

One for each `secret_path` and `retry_secret_path` of the configuration, made if the file is not there; and
one made at every start, for cookies that name no file. The operator's files are never changed.
"""

import os
from collections.abc import Mapping

from expressgateway.config.load import Loaded
from expressgateway.config.material import SECRET_BYTES, secret_paths
from expressgateway.control.channel import pack_bytes
from expressgateway.control.failures import StartError

OWN = ""
"""The name of the one that is made at every start."""


class Secrets:
    """Every secret in use, by the path of its file."""

    __slots__ = ("_made",)

    def __init__(self) -> None:
        self._made: dict[str, bytes] = {OWN: os.urandom(SECRET_BYTES)}

    @property
    def own(self) -> bytes:
        return self._made[OWN]

    @own.setter
    def own(self, secret: bytes) -> None:
        self._made[OWN] = secret

    def packed(self, loaded: Loaded) -> Mapping[str, str]:
        """Those a configuration needs, as they travel to workers. Raises `StartError` if a file cannot be
        made."""
        secrets = {OWN: pack_bytes(self._made[OWN])}
        for path, loc in secret_paths(loaded.config):
            name = str(path)
            data = loaded.material.files.get(name) or self._made.get(name)
            if data is None:
                data = self._made[name] = _make(name, str(loc[-1]))
            secrets[name] = pack_bytes(data)
        return secrets


def _make(path: str, key: str) -> bytes:
    secret = os.urandom(SECRET_BYTES)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(secret)
        except OSError:
            os.unlink(path)  # half a secret would be refused at the next start
            raise
    except OSError as error:
        raise StartError(
            f"the secret {path} cannot be made: {error.strerror}; create its directory, or choose another "
            f"{key}"
        ) from None
    return secret
