"""``session_affinity``: a client stays with the backend it was given first, whatever becomes of the set.

New clients are balanced by ``maglev``. Then they are known again in one of two ways. With a cookie, by a
*token* in it: a keyed digest of the backend's id, which says nothing about the backend and which nobody can
make without the secret; all workers know all tokens. Without one, by their key: what a key was bound to is
remembered for the last 65,536 of them, by each worker for itself (another worker would choose the same
backend as long as the set is the same).

A backend of weight 0 gets no new clients and keeps those it has. Whether it may still be used is for the
pool to know.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Final

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection.maglev import Maglev

_MAX_BOUND: Final = 65536  # keys remembered; the one used longest ago is forgotten: 12 MiB at most
_MAX_SECRET: Final = 64  # bytes blake2b takes as its key


class SessionAffinity:
    __slots__ = ("_bound", "_by_id", "_by_token", "_has_cookie", "_maglev", "_secret", "_tokens")

    def __init__(
        self,
        backends: Sequence[Backend],
        maglev: Maglev,
        *,
        has_cookie: bool = False,
        secret: bytes = b"",
        bound: OrderedDict[bytes, str] | None = None,
        tokens: Mapping[str, bytes] | None = None,
    ) -> None:
        """``maglev``: of the same backends. ``secret``: the same for all workers; needed with cookies, and
        ``ValueError`` without it. ``bound``, ``tokens``: what was bound and made before, by id."""
        if has_cookie and not secret:
            raise ValueError("session_affinity with a cookie needs a secret to make its tokens with")
        self._has_cookie = has_cookie
        self._secret = secret[:_MAX_SECRET]
        self._maglev = maglev
        self._by_id = {backend.id: backend for backend in backends}
        known = tokens or {}
        self._tokens: dict[str, bytes] = {id_: known.get(id_) or self._make_token(id_) for id_ in self._by_id}
        self._by_token = {self._tokens[id_]: backend for id_, backend in self._by_id.items()}
        self._bound: OrderedDict[bytes, str] = OrderedDict() if bound is None else bound
        """Ids, by digests of keys - a long key costs no more than a short one - in the order of use."""

    def pick(self, key: bytes | None) -> Backend | None:
        return self._maglev.pick(key)

    def others(self, picked: Backend) -> Iterator[Backend]:
        return self._maglev.others(picked)

    def rebuilt(self, backends: Sequence[Backend]) -> "SessionAffinity":
        return SessionAffinity(
            backends,
            self._maglev.rebuilt(backends),
            has_cookie=self._has_cookie,
            secret=self._secret,
            bound=self._bound,
            tokens=self._tokens,
        )

    def advance(self, steps: int) -> bool:
        return self._maglev.advance(steps)

    def bound(self, key: bytes) -> Backend | None:
        if self._has_cookie:
            return self._by_token.get(key)
        digest = blake2b(key, digest_size=16).digest()
        id_ = self._bound.get(digest)
        if id_ is None:
            return None
        self._bound.move_to_end(digest)
        return self._by_id.get(id_)

    def bind(self, key: bytes, backend: Backend) -> None:
        if self._has_cookie:
            return
        bound = self._bound
        digest = blake2b(key, digest_size=16).digest()
        bound[digest] = backend.id
        bound.move_to_end(digest)
        if len(bound) > _MAX_BOUND:
            bound.popitem(last=False)

    def token(self, backend: Backend) -> bytes:
        return self._tokens.get(backend.id) or self._make_token(backend.id)

    def _make_token(self, id_: str) -> bytes:
        return blake2b(id_.encode(), digest_size=16, key=self._secret).hexdigest().encode()
