"""``random``: any backend, each with the same chance. Weights do not count, except that 0 is never picked."""

from collections.abc import Iterator, Sequence
from random import random, sample

from expressgateway.upstream.backend import Backend


class Uniform:
    __slots__ = ("_backends",)

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = [backend for backend in backends if backend.weight > 0]

    def pick(self, key: bytes | None) -> Backend | None:
        backends = self._backends
        return backends[int(random() * len(backends))] if backends else None

    def others(self, picked: Backend) -> Iterator[Backend]:
        """In an order of chance, so that what one cannot take is spread over all."""
        return (each for each in sample(self._backends, len(self._backends)) if each is not picked)

    def rebuilt(self, backends: Sequence[Backend]) -> "Uniform":
        return Uniform(backends)
