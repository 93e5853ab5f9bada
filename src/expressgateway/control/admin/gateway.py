"""What the API needs of the supervisor."""

from typing import Any, Protocol

from expressgateway.control.admin import shapes
from expressgateway.control.changes import Change
from expressgateway.control.reload import Check, Outcome


class Resources(Protocol):
    """Everything the API shows and does. What is shown is as it was last told, and at hand, unless it is
    awaited."""

    def unready(self) -> str | None:
        """Why nothing can be changed at present; None: it can."""
        ...

    def status(self) -> shapes.Status: ...
    def config(self) -> shapes.EffectiveConfig: ...
    def listeners(self) -> list[shapes.Listener]: ...
    def workers(self) -> list[shapes.Worker]: ...

    def pools(self) -> list[dict[str, Any]]:
        """Every pool as `view.pools_shown` shows them."""
        ...

    def certificates(self) -> list[dict[str, Any]]:
        """Every certificate in use, with its expiry."""
        ...

    async def connections(self, limit: int) -> shapes.Connections:
        """Counts of all, and at most `limit` of them by name."""
        ...

    async def xdp(self) -> shapes.Xdp:
        """The XDP data plane, as it is now."""
        ...

    async def xdp_flows(self, limit: int) -> shapes.XdpFlows:
        """At most `limit` of the flows in the kernel. Raises `ChangeError`."""
        ...

    async def detach_xdp(self) -> bool:
        """Take the program away, until the next reload or start. False: there is none."""
        ...

    def log_level(self) -> str: ...

    def set_log_level(self, level: str) -> None:
        """Of this process and of every worker, those to come included."""
        ...

    async def change(self, change: Change, check: Check | None = None) -> Outcome:
        """Make a change, after the reload and the changes that came before. Raises `ChangeError`."""
        ...

    def set_state(self, pool: str, backend: str, state: str, cause: str) -> None:
        """Put an address (by its id in `pools`) into one of `backends.STATES`. Raises `ChangeError`."""
        ...

    async def reload(self, check: Check | None = None) -> Outcome:
        """Read the file again, after what was asked before. Raises `ChangeError`."""
        ...

    async def renew(self) -> Outcome:
        """Read certificates and keys again. Raises `ChangeError`."""
        ...

    def begin_drain(self, cause: str) -> None:
        """Stop as SIGTERM does. Does nothing if the gateway is stopping already."""
        ...
