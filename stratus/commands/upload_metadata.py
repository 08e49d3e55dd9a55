"""stratus-upload-metadata"""

from __future__ import annotations

from pathlib import Path

import click

from stratus.cli import Session, command
from stratus.errors import ConfigError, file_errors
from stratus.marketplace import post
from stratus.views import RECEIPT

EXAMPLES = """
  To the Marketplace of your site:
    stratus-upload-metadata signed.xml --marketplace https://marketplace.example.org
  That address for good, in ~/.config/stratus/config.ini:
    [stratus]
    marketplace = https://marketplace.example.org
"""


@command(EXAMPLES)
@click.argument("entry", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE")
@click.option("--marketplace", metavar="URL", help="Address of the Marketplace.  [env STRATUS_MARKETPLACE]")
def main(session: Session, entry: Path) -> None:
    """Post a signed entry to a Marketplace, where others find it by the image's identifier.

    Prints what it answered. Some Marketplaces first ask the endorser by e-mail: status 202.
    """
    config = session.client.config
    if config.marketplace is None:
        raise ConfigError("to which Marketplace?", "give --marketplace URL, or set it in the configuration")
    with file_errors(entry, "read"):
        document = entry.read_bytes()
    receipt = post(config.marketplace, document, str(config.cacert) if config.cacert else None)
    session.output.record(RECEIPT, receipt._asdict())
