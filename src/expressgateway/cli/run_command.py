"""The commands that run a gateway: `run` and `demo`."""

import gc
import sys
from pathlib import Path
from typing import Final

import click

DEFAULT_CONFIG: Final = "config/default.toml"

_CONFIG = click.argument("config", type=click.Path(path_type=Path), default=DEFAULT_CONFIG)
_INSECURE = click.option(
    "--insecure-key-permissions",
    is_flag=True,
    help="Key files that group or others can read are a warning, not an error.",
)


@click.command()
@_CONFIG
@_INSECURE
def run(config: Path, insecure_key_permissions: bool) -> None:
    """Run the gateway with CONFIG (config/default.toml) until a signal ends it.

    SIGTERM and SIGINT drain and stop, a second one stops at once; SIGHUP reloads CONFIG.
    """
    gc.disable()  # modules make no cycles that are ever free
    from expressgateway.control.supervisor import Options
    from expressgateway.control.supervisor import run as supervise

    gc.enable()
    sys.exit(supervise(config, Options(insecure_key_permissions=insecure_key_permissions)))


@click.command()
@click.option("--port", type=click.IntRange(1, 65000), help="First of the consecutive ports to use.")
def demo(port: int | None) -> None:
    """Run a gateway with embedded backends, and print commands to try it with."""
    from expressgateway.demo.app import run_demo

    sys.exit(run_demo(port))
