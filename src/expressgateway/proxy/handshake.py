"""A WebSocket handshake on its way from one protocol to another.

On HTTP/1.1 a handshake is an upgrade with a *key*, which the backend's *accept value* answers (RFC 6455 4);
on HTTP/2 it is an extended CONNECT with neither (RFC 8441 5), and any success opens the tunnel. Key and
accept value belong to the HTTP/1.1 hop: between two such hops they pass untouched, else the gateway makes,
checks, answers and drops them. Versions, subprotocols and extensions are a matter between the two ends.

What codecs do by themselves is not done here: CONNECT and ``:protocol``, Connection and Upgrade, 101 and 200.
"""

import os
from typing import Final

from expressgateway.wire.head import NO_FIELDS, Fields, RequestHead, ResponseHead, SharedFields
from expressgateway.wire.ws import accept_value, is_valid_key, make_key

KEY: Final = b"sec-websocket-key"
ACCEPT: Final = b"sec-websocket-accept"
VERSION: Final = b"sec-websocket-version"
_KEYED: Final = frozenset({b"1.0", b"1.1"})  # protocols whose handshakes have a key


class Handshake:
    """One client's handshake with one backend, which speaks ``version``."""

    __slots__ = ("_head", "_is_back_keyed", "_is_front_keyed", "_key")

    def __init__(self, head: RequestHead, version: bytes) -> None:
        self._head = head
        self._is_front_keyed = head.version in _KEYED
        self._is_back_keyed = version in _KEYED
        self._key = b""  # the client's or ours; empty while it passes untouched, or nobody has one

    def take_request(self) -> RequestHead | None:
        """The head to send; ``None`` if the client's key is none, and the backend would never see it."""
        head = self._head
        if self._is_front_keyed and self._is_back_keyed:
            return head
        fields, more = head.shared.fields, head.headers
        keys = [value for name, value in (*fields, *more) if name == KEY]
        if self._is_front_keyed:
            if len(keys) != 1 or not is_valid_key(keys[0]):
                return None
            self._key = keys[0]
        more = _without(more, KEY)
        if self._is_back_keyed:
            self._key = make_key(os.urandom(16))
            more = (*more, (KEY, self._key))
            if not any(name == VERSION for name, _ in fields):
                more = (*more, (VERSION, b"13"))
        sent = RequestHead(
            head.method, head.scheme, head.authority, head.path, more, head.protocol, None, head.version
        )
        sent.shared = SharedFields(_without(fields, KEY))
        return sent

    def take_answer(self, head: ResponseHead) -> str:
        """Judge the backend's agreement, and take off what is not for the client. Gives what is wrong."""
        if self._is_front_keyed and self._is_back_keyed:
            return ""
        accepts = [value for name, value in head.headers if name == ACCEPT]
        if accepts:
            head.headers = _without(head.headers, ACCEPT)
        if not self._is_back_keyed or accepts == [accept_value(self._key)]:
            return ""
        return "a Sec-WebSocket-Accept that does not fit the key" if accepts else "no Sec-WebSocket-Accept"

    @property
    def fields(self) -> Fields:
        """What the client is told beside the backend's fields."""
        if self._is_front_keyed and not self._is_back_keyed:
            return ((ACCEPT, accept_value(self._key)),)
        return NO_FIELDS

    def would_mislead(self, status: int) -> bool:
        """Whether an answer that opens no tunnel would be taken for one that does (RFC 8441 5)."""
        return not self._is_front_keyed and 200 <= status < 300


def _without(fields: Fields, unwanted: bytes) -> Fields:
    return tuple(field for field in fields if field[0] != unwanted)
