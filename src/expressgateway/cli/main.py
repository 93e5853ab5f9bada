"""The command `expressgateway`.

``expressgateway FILE`` runs the gateway, as ``expressgateway run FILE`` does. Commands are imported when they
are used, so that none of them pays for the others.
"""

import difflib
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click

_COMMANDS: Final = {
    "run": "expressgateway.cli.run_command:run",
    "check": "expressgateway.cli.config_commands:check",
    "status": "expressgateway.cli.status_command:status",
    "config": "expressgateway.cli.admin_commands:show_config",
    "reload": "expressgateway.cli.admin_commands:reload",
    "upgrade": "expressgateway.cli.admin_commands:upgrade",
    "drain": "expressgateway.cli.admin_commands:drain",
    "certificates": "expressgateway.cli.admin_commands:certificates",
    "log-level": "expressgateway.cli.admin_commands:log_level",
    "backend": "expressgateway.cli.backend_commands:backend",
    "xdp": "expressgateway.cli.xdp_commands:xdp",
    "demo": "expressgateway.cli.run_command:demo",
    "init": "expressgateway.cli.config_commands:init",
    "schema": "expressgateway.cli.config_commands:schema",
    "hash-token": "expressgateway.cli.config_commands:hash_token",
}
_OWN_OPTIONS: Final = ("--help", "-h", "--version")


class Commands(click.Group):
    """A group whose default command is `run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in _COMMANDS and args[0] not in _OWN_OPTIONS):
            self._check_word(args)
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def _check_word(self, args: list[str]) -> None:
        """A misspelt command is not looked for as a file."""
        if args and args[0].isidentifier() and not Path(args[0]).exists():
            near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"{args[0]!r} is neither a command nor a file.{hint}")

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = _COMMANDS.get(cmd_name)
        if place is None:
            return None
        module, _, name = place.partition(":")
        command: Any = getattr(import_module(module), name)
        return command if isinstance(command, click.Command) else None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    package_name="expressgateway", prog_name="expressgateway", message="%(prog)s %(version)s"
)
def main() -> None:
    """A load balancer and reverse proxy for layers 4 and 7.

    `expressgateway [CONFIG]` runs the gateway; CONFIG is config/default.toml if it is not given.

    Exit codes: 0 clean stop or valid configuration, 1 failure, 2 usage, 78 invalid configuration.
    """
