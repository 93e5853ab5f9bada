"""All that workers are told of backends, beside the configuration: where they are, and who of them is well.

Ties discovery, the health board and the secrets of session cookies to the configuration in force. It decides
nothing itself; the supervisor asks it for the parts of a snapshot and hands on what it has to say.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from expressgateway.config.load import Loaded
from expressgateway.config.schema import Config
from expressgateway.control.admin.view import Seen
from expressgateway.control.channel import Message
from expressgateway.control.discovery import Discovery
from expressgateway.control.health import HealthBoard, PoolTargets, health_settings, outlier_settings
from expressgateway.control.secrets import Secrets
from expressgateway.control.targets import backend_settings
from expressgateway.control.xdp_wanted import Known
from expressgateway.observe.counters import Sample
from expressgateway.upstream.backend import BackendSettings
from expressgateway.upstream.discovery import expand, names_of

_FIRST_ANSWERS_S: Final = 2.0  # how long a configuration waits for DNS before it is taken into use
_PAUSE_PER_COST: Final = 10
"""Changed answers are handed on all together, with pauses so many times as long as that took: many names that
change often cost a tenth of this process's time, and not all of it."""


class Upstreams:
    """See the module's text. ``tell`` takes messages for every worker."""

    def __init__(self, tell: Callable[[list[Message]], None]) -> None:
        self._tell = tell
        self._discovery = Discovery(self._on_answers)
        self.board = HealthBoard(lambda message: tell([message]))
        self._secrets = Secrets()
        self._config: Config | None = None
        self._backends: dict[str, tuple[BackendSettings, ...]] = {}
        self._handing_on: asyncio.TimerHandle | None = None
        self._quiet_until = 0.0  # on the loop's clock

    @property
    def secret(self) -> bytes:
        """The one that is made at every start: for the process that comes after this one."""
        return self._secrets.own

    def restore(self, secret: bytes | None) -> None:
        """Go on with the secret of the process before this one, if there was one."""
        if secret is not None:
            self._secrets.own = secret

    async def prepare(self, loaded: Loaded) -> None:
        """Learn what a configuration that is about to be used needs to be known."""
        settings = [each for backends in _settings(loaded).values() for each in backends]
        await self._discovery.preload(names_of(settings), _FIRST_ANSWERS_S)

    def adopt(self, loaded: Loaded) -> None:
        """This configuration is in force."""
        self._config = loaded.config
        self._backends = _settings(loaded)
        self._discovery.apply(self._backends)
        self._adopt_found()
        # They may have changed after the snapshot was made, and workers been told before they got it.
        self._tell([self._discovery.message()])

    def _adopt_found(self) -> None:
        config = self._config
        if config is None:
            return
        answers = self._discovery.answers()
        self.board.adopt(
            {
                pool.name: PoolTargets(
                    health_settings(pool.health),
                    outlier_settings(pool.outlier),
                    pool.load_balancing.slow_start_ms / 1000,
                    expand(self._backends[pool.name], answers),
                )
                for pool in config.every_pool()
            }
        )

    def _on_answers(self, _: frozenset[str]) -> None:
        if self._config is not None and self._handing_on is None:
            self._handing_on = asyncio.get_running_loop().call_at(self._quiet_until, self._hand_on)

    def _hand_on(self) -> None:
        self._handing_on = None
        began = time.perf_counter()
        self._adopt_found()
        self._tell([self._discovery.message()])
        cost_s = time.perf_counter() - began
        self._quiet_until = asyncio.get_running_loop().time() + _PAUSE_PER_COST * cost_s

    # -- what workers are told

    def part(self, loaded: Loaded) -> Message:
        """What the snapshot of a configuration carries. Raises `StartError`."""
        return {"answers": self._discovery.message()["names"], "secrets": self._secrets.packed(loaded)}

    def standing(self) -> list[Message]:
        """What a worker that was just configured has missed."""
        return [self._discovery.message(), self.board.message()]

    def known(self, pool: str) -> Known:
        """What is known of a pool, for whoever balances it beside the workers."""
        found = expand(self._backends.get(pool, ()), self._discovery.answers())
        return Known(tuple(found), self.board.message((pool,))["pools"].get(pool))

    # -- what can be seen

    def seen(self) -> dict[str, list[Seen]]:
        """What is known of each address, by pool."""
        answers = self._discovery.answers()
        found: dict[str, list[Seen]] = {}
        for pool, backends in self._backends.items():
            owners = {id_: settings.id for settings, _, id_ in expand(backends, answers)}
            found[pool] = [
                Seen(
                    id=row["id"],
                    of=owners.get(row["id"], row["id"]),
                    address=row["address"],
                    state=row["state"],
                    since=row["since"],
                    cause=row["cause"],
                    last_probe=row["last_probe"],
                )
                for row in self.board.describe(pool)
            ]
        return found

    def panicking(self) -> list[str]:
        return [pool for pool in self._backends if self.board.describe_pool(pool)["is_panicking"]]

    def names(self) -> list[dict[str, Any]]:
        return self._discovery.describe()

    def samples(self) -> Iterator[Sample]:
        yield from self._discovery.samples()
        yield from self.board.samples()

    def close(self) -> None:
        if self._handing_on is not None:
            self._handing_on.cancel()
            self._handing_on = None
        self._discovery.close()
        self.board.close()


def _settings(loaded: Loaded) -> dict[str, tuple[BackendSettings, ...]]:
    files = loaded.material.files
    return {
        pool.name: tuple(backend_settings(backend, files) for backend in pool.backends)
        for pool in loaded.config.every_pool()
    }
