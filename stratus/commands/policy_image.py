"""stratus-policy-image"""

from __future__ import annotations

import click

from stratus.arguments import checksum_option
from stratus.cli import Session, command
from stratus.errors import Exit
from stratus.views import JUDGED, judged

EXAMPLES = """
  May this image be used here, and who says so?
    stratus-policy-image BEE8-MMAw-Lk_IgsEExAy3d9R8h
  In a script; the exit code is the answer:
    stratus-policy-image -q https://cloud.example.org/debian-12.qcow2 && echo allowed
"""


@command(EXAMPLES)
@click.argument("reference", metavar="REF")
@checksum_option("What an image named by its address must have, if nobody endorses it.")
def main(session: Session, reference: str, checksum: str | None) -> None:
    """Ask whether the site's policy lets an image in. Nothing of the image is downloaded.

    Prints the entry that passes, and ends with 0; or every entry with the rule that refuses it, and ends with 1.
    """
    body = {"reference": reference} | ({"checksum": checksum} if checksum else {})
    answer = session.client.mutate("POST", "/v1/judgements", body)
    judgement = answer.document if answer.operation is None else session.finish(answer.operation)["result"]
    if session.output.format == "json":
        session.output.record(JUDGED, judgement)
    else:
        session.output.records(JUDGED, judged(judgement))
    if not judgement.get("passed"):
        session.output.say("no entry passes" if judgement["refused"] else "nobody says anything about this image")
        click.get_current_context().exit(Exit.FAILED)
