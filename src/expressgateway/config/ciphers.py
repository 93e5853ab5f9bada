"""Which ciphers a file may name for TLS 1.2, in OpenSSL's notation.

OpenSSL ignores what it does not know beside what it knows, so every word is tried by itself. A TLS context is
built by the same rule later, in a worker; a test holds the two against each other, because what passes here
must not fail there.
"""

import re
import ssl

from expressgateway.config.values import BadValueError, expect_string, shown

_HINT = "`openssl ciphers -v` lists them; those of TLS 1.3 need not be named"


def parse_ciphers(value: object) -> str:
    """The text as it stands. Raises `BadValueError`."""
    text = expect_string(value, "a list of ciphers")
    scratch = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for word in re.split(r"[:, ]+", text.strip()):
        try:
            # "@SECLEVEL=1" and its like are no ciphers, and need one beside them.
            scratch.set_ciphers(f"{word}:ALL" if word.startswith("@") else word.lstrip("!-+"))
        except (ssl.SSLError, ValueError):  # ValueError: a NUL
            raise BadValueError(
                f"expected TLS 1.2 ciphers that OpenSSL knows, joined by colons, found {shown(word)}", _HINT
            ) from None
    try:
        scratch.set_ciphers(text)
    except ssl.SSLError:
        raise BadValueError(f"{shown(text)} leaves no cipher to use", _HINT) from None
    for cipher in scratch.get_ciphers():
        if cipher["auth"] == "auth-null" or not cipher["strength_bits"]:
            raise BadValueError(
                f"{shown(text)} has {cipher['name']}, which does not authenticate or does not encrypt",
                'add "!aNULL:!eNULL"',
            )
    return text
