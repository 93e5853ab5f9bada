"""The commands that only look at configuration: `check`, `schema`, `init` and `hash-token`.

They bind nothing and start nothing. Exit codes: 0 valid, 2 usage, 78 invalid configuration (`EX_CONFIG`).
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Final

import click

from expressgateway.config.diagnose import ConfigError, report
from expressgateway.config.load import load
from expressgateway.config.reference import json_schema, markdown
from expressgateway.config.render import toml
from expressgateway.config.starter import STARTER

EXIT_CONFIG: Final = 78


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of everything found.")
@click.option("--print", "print_effective", is_flag=True, help="Print the effective configuration as TOML.")
@click.option(
    "--insecure-key-permissions",
    is_flag=True,
    help="Key files that group or others can read are a warning, not an error.",
)
def check(config: Path, as_json: bool, print_effective: bool, insecure_key_permissions: bool) -> None:
    """Check CONFIG and the files it names, without binding or changing anything."""
    if as_json and print_effective:
        raise click.UsageError("--json and --print exclude each other.")
    try:
        loaded = load(config, insecure_key_permissions=insecure_key_permissions)
    except ConfigError as error:
        if as_json:
            click.echo(json.dumps([d.as_dict() for d in error.diagnostics], indent=2, ensure_ascii=False))
        else:
            click.echo(report(error.diagnostics), err=True)
            click.echo(f"\n{_count(error)}", err=True)
        sys.exit(EXIT_CONFIG)
    if as_json:
        click.echo(json.dumps([d.as_dict() for d in loaded.warnings], indent=2, ensure_ascii=False))
        return
    if loaded.warnings:
        click.echo(report(loaded.warnings), err=True)
    if print_effective:
        click.echo(toml(loaded.config), nl=False)
    else:
        click.echo(f"{config} is valid")


def _count(error: ConfigError) -> str:
    errors = sum(diagnostic.severity == "error" for diagnostic in error.diagnostics)
    warnings = len(error.diagnostics) - errors
    text = f"{errors} error{'' if errors == 1 else 's'}"
    return f"{text}, {warnings} warning{'' if warnings == 1 else 's'}" if warnings else text


@click.command()
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the reference documentation instead.")
def schema(as_markdown: bool) -> None:
    """Print the JSON Schema of the configuration file, for editors."""
    if as_markdown:
        click.echo(markdown(), nl=False)
    else:
        click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--force", is_flag=True, help="Overwrite FILE.")
def init(file: Path | None, force: bool) -> None:
    """Write a commented configuration to FILE, or print it."""
    if file is None:
        click.echo(STARTER, nl=False)
        return
    try:
        with file.open("w" if force else "x", encoding="utf-8") as target:
            target.write(STARTER)
    except FileExistsError:
        raise click.ClickException(f"{file} exists already; --force overwrites it.") from None
    except OSError as error:
        raise click.ClickException(f"{file} cannot be written: {error.strerror}.") from None
    click.echo(f"wrote {file}; check it with: expressgateway check {file}")


@click.command(name="hash-token")
def hash_token() -> None:
    """Read a token and print the SHA-256 for `admin.api_token_hash`.

    The token is read from standard input, or asked for on a terminal without showing it.
    """
    if sys.stdin.isatty():
        token: str = click.prompt("Token", hide_input=True, confirmation_prompt=True, err=True)
    else:
        # `echo token | ...` ends with a newline that no client will ever send
        token = sys.stdin.read().rstrip("\r\n")
    if not token or any(char.isspace() for char in token) or not token.isascii() or not token.isprintable():
        raise click.UsageError("A token is one or more visible ASCII characters, without blanks.")
    click.echo(hashlib.sha256(token.encode()).hexdigest())
