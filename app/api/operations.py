"""/v1/operations"""

from __future__ import annotations

from sqlalchemy.orm import Session

from app import operations
from app.api import documents
from app.api.contract import Answer, Call, Routes
from app.api.mutation import Done, await_end, mutate, operation_document
from app.models import Operation
from app.notify import WORK
from app.paging import page
from app.schemas import DryRun, Empty, OperationDocument, OperationFilter, OperationPage, Wait

routes = Routes("operations")


@routes.add("GET", "/v1/operations", query=OperationFilter, answers={200: OperationPage})
def list_operations(call: Call) -> Answer:
    """List your operations, those you joined among them, the newest first."""
    caller, filters = call.caller, []
    if call.query.state is not None:
        filters.append(Operation.state == call.query.state)
    if call.query.resource is not None:
        filters.append(Operation.resource_id == call.query.resource)
    whose = [Operation.principal_id == caller.id, operations.watched_by(caller)]
    branches = [filters] if caller.is_admin else [[mine, *filters] for mine in whose]
    with call.read() as session:
        found = page(
            session, Operation, limit=call.query.limit, cursor=call.query.next, branches=branches, newest_first=True
        )
        return Answer(200, documents.page(OperationPage, found, operation_document))


@routes.add("GET", "/v1/operations/{id}", query=Wait, answers={200: OperationDocument})
def get_operation(call: Call) -> Answer:
    """Show an operation; with `wait`, as soon as it has ended."""
    with call.read() as session:
        operation = operations.find(session, call.caller, call.id)
    if operation.state in operations.FINAL:
        return Answer(200, operation_document(operation))
    return await_end(call, call.id, call.query.wait, lambda _, found: Answer(200, operation_document(found)))


@routes.add("POST", "/v1/operations/{id}/cancel", body=Empty, query=DryRun, answers={200: OperationDocument})
def cancel_operation(call: Call) -> Answer:
    """Ask a copy or a fetch to end; it leaves nothing behind. While others wait for it, only your part in it ends."""

    def intend(session: Session) -> Done:
        return Done(Answer(200, operation_document(operations.cancel(session, call.caller, call.id))))

    answer = mutate(call, intend)
    call.service.bus.announce(WORK)
    return answer
