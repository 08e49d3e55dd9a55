"""/v1/snapshots"""

from __future__ import annotations

from app import snapshots
from app.api import documents
from app.api.contract import Answer, Call, Routes
from app.api.mutation import mutate
from app.schemas import DryRun, OperationDocument, SnapshotDocument, SnapshotFilter, SnapshotPage

routes = Routes("snapshots")


@routes.add("GET", "/v1/snapshots", query=SnapshotFilter, answers={200: SnapshotPage})
def list_snapshots(call: Call) -> Answer:
    """List your snapshots, a page at a time."""
    with call.read() as session:
        found = snapshots.list_page(session, call.caller, call.query)
        return Answer(200, documents.page(SnapshotPage, found, documents.snapshot))


@routes.add("GET", "/v1/snapshots/{id}", answers={200: SnapshotDocument}, headers={200: ("ETag",)})
def get_snapshot(call: Call) -> Answer:
    """Show a snapshot."""
    with call.read() as session:
        found = snapshots.find(session, call.caller, call.id)
        return Answer(200, documents.snapshot(found), documents.etag(found))


@routes.add("DELETE", "/v1/snapshots/{id}", query=DryRun, if_match=True, answers={204: None, 202: OperationDocument})
def delete_snapshot(call: Call) -> Answer:
    """Delete a snapshot; volumes made from it are not touched."""
    return mutate(call, lambda session: snapshots.request_delete(session, call.caller, call.id, call.if_match))
