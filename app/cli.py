"""`stratus-storage`: what an operator runs on the host of the service."""

from __future__ import annotations

import os

import click

from app.commands import accounts, care, running


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stratus-storage")
def main() -> None:
    """Persistent iSCSI volumes for machines: run the service, look after it.

    Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 permission, 6 timeout, 7 unavailable.
    """
    os.umask(0o077)  # whatever is made below a home that exists already is nobody else's to read


COMMANDS: tuple[click.Command, ...] = (
    running.serve,
    running.worker,
    running.upgrade,
    running.show_config,
    running.doctor,
    care.pools,
    care.reconcile,
    care.reset_state,
    care.verify_events,
    care.rotate_keys,
    accounts.user,
    accounts.token,
    accounts.group,
    accounts.node,
    accounts.quota,
)
for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
