"""serve, worker, upgrade, config, doctor: the service as processes on a host."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from app.commands.common import with_bare_settings, with_settings
from app.commands.output import format_option
from app.config import Settings, redacted


@click.command()
@with_settings
@click.option("--listen", metavar="HOST:PORT", help="Where the HTTP API listens. [127.0.0.1:8080]")
@click.option("--portal", metavar="HOST:PORT", help="Where initiators reach the volumes. [127.0.0.1:3261]")
@click.option("--tls-cert", type=click.Path(exists=True, path_type=Path), help="Certificate chain, PEM.")
@click.option("--tls-key", type=click.Path(exists=True, path_type=Path), help="Its key, PEM.")
@click.option("--behind-proxy", is_flag=True, help="A proxy in front terminates TLS and sets X-Forwarded-For.")
@click.option("--keep-target", is_flag=True, help="Leave the target serving when this stops; the next start adopts it.")
def serve(settings: Settings, keep_target: bool, **_: Any) -> None:
    """Run the whole service in the foreground: API, worker and a private target, all state under HOME.

    The first start makes the database and HOME/admin.token. Stop it with Ctrl-C or SIGTERM.

    \b
    Example:
      stratus-storage serve --home /srv/stratus --listen 127.0.0.1:8080 --portal 10.0.0.5:3260
    """
    from app import supervisor

    sys.exit(supervisor.serve(settings, keep_target=keep_target))


@click.command()
@with_bare_settings
def worker(settings: Settings) -> None:
    """Run the worker alone (`serve` does it for you): the one process that touches storage.

    The target outlives it, and is adopted by the next one.
    """
    from app import worker_process

    worker_process.run(settings)


@click.command()
@with_settings
@click.option("--revision", default="head", show_default=True)
def upgrade(settings: Settings, revision: str) -> None:
    """Bring the database to this version (`serve` does it at its start)."""
    from app.service import migrate

    settings.make_directories()
    migrate(settings, revision)
    click.echo(f"{redacted(settings)['database']['url']} is at {revision}")


@click.command("config")
@with_settings
def show_config(settings: Settings) -> None:
    """Print the configuration in force, as JSON, without secrets."""
    click.echo(json.dumps(redacted(settings), indent=2))


@click.command()
@with_settings
@format_option
def doctor(settings: Settings, style: str) -> None:
    """Say what this host can do and what is missing; exit 1 if the service cannot run."""
    from app import diagnosis

    checks = diagnosis.examine(settings)
    if style == "json":
        shown = [{"name": each.name, "verdict": each.verdict, "detail": each.detail} for each in checks]
        click.echo(json.dumps(shown, indent=2))
    else:
        for check in checks:
            click.echo(f"{check.verdict:8} {check.name:14} {check.detail}")
    sys.exit(1 if any(check.verdict == "missing" for check in checks) else 0)
