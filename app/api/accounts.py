"""/v1/whoami, users, nodes, tokens, groups, quotas"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import accounts
from app.api import documents
from app.api.contract import Answer, Call, Link, Routes
from app.api.mutation import Done, mutate
from app.models import Group, GroupMember
from app.schemas import (
    DryRun,
    GroupCreate,
    GroupDocument,
    GroupPage,
    GroupUpdate,
    NewToken,
    NodeCreate,
    NodeDocument,
    NodePage,
    NodeUpdate,
    Paging,
    QuotaDocument,
    QuotaUpdate,
    TokenCreate,
    TokenPage,
    UserCreate,
    UserDocument,
    UserPage,
    UserUpdate,
    Whoami,
)

routes = Routes("accounts")


def _links(*names: str) -> tuple[Link, ...]:
    return tuple(Link(201, name, "name", "/name") for name in names)


LOCATION = {201: ("Location",)}
QUOTA = tuple(Link(201, name, "user", "/name") for name in ("get_quota", "set_quota"))


@routes.add("GET", "/v1/whoami", answers={200: Whoami})
def whoami(call: Call) -> Answer:
    """Tell who you are signed in as."""
    with call.read() as session:
        mine = select(Group.name).join(GroupMember).where(GroupMember.user_id == call.caller.id).order_by(Group.name)
        me = {"id": call.caller.id, "name": call.caller.name, "role": call.caller.role}
        return Answer(200, Whoami.model_validate(me | {"groups": list(session.scalars(mine))}))


# ---------------------------------------------------------------- users


@routes.add("GET", "/v1/users", query=Paging, answers={200: UserPage})
def list_users(call: Call) -> Answer:
    """List users and admins (admin)."""
    with call.read() as session:
        found = accounts.principals(session, call.caller, call.query, nodes=False)
        return Answer(200, documents.page(UserPage, found, documents.user))


@routes.add("POST", "/v1/users", body=UserCreate, query=DryRun, answers={201: UserDocument},
            headers=LOCATION, links=(*_links("get_user", "update_user", "delete_user"), *QUOTA))  # fmt: skip
def create_user(call: Call) -> Answer:
    """Create a user or an admin (admin)."""

    def intend(session: Session) -> Done:
        user = accounts.add_user(session, call.caller, call.body)
        return Done(Answer(201, documents.user(user), {"Location": f"/v1/users/{user.name}"}))

    return mutate(call, intend)


@routes.add("GET", "/v1/users/{name}", answers={200: UserDocument})
def get_user(call: Call) -> Answer:
    """Show a user; yourself, or anyone for an admin."""
    with call.read() as session:
        return Answer(200, documents.user(accounts.find_user(session, call.caller, call.path["name"], node=False)))


@routes.add("PATCH", "/v1/users/{name}", body=UserUpdate, query=DryRun, answers={200: UserDocument})
def update_user(call: Call) -> Answer:
    """Change your password; enable or disable an account (admin)."""

    def intend(session: Session) -> Done:
        return Done(
            Answer(200, documents.user(accounts.change_user(session, call.caller, call.path["name"], call.body)))
        )

    return mutate(call, intend)


@routes.add("DELETE", "/v1/users/{name}", query=DryRun, answers={204: None})
def delete_user(call: Call) -> Answer:
    """Delete a user who has nothing (admin)."""

    def intend(session: Session) -> Done:
        accounts.delete_user(session, call.caller, call.path["name"], node=False)
        return Done(Answer(204))

    return mutate(call, intend)


# ---------------------------------------------------------------- nodes


@routes.add("GET", "/v1/nodes", query=Paging, answers={200: NodePage})
def list_nodes(call: Call) -> Answer:
    """List the nodes (admin)."""
    with call.read() as session:
        found = accounts.principals(session, call.caller, call.query, nodes=True)
        return Answer(200, documents.page(NodePage, found, documents.node))


@routes.add("POST", "/v1/nodes", body=NodeCreate, query=DryRun, answers={201: NodeDocument},
            headers=LOCATION, links=_links("get_node", "update_node", "delete_node"))  # fmt: skip
def create_node(call: Call) -> Answer:
    """Register a hypervisor by its name and its initiator (admin)."""

    def intend(session: Session) -> Done:
        node = accounts.add_node(session, call.caller, call.body)
        return Done(Answer(201, documents.node(node), {"Location": f"/v1/nodes/{node.name}"}))

    return mutate(call, intend)


@routes.add("GET", "/v1/nodes/{name}", answers={200: NodeDocument})
def get_node(call: Call) -> Answer:
    """Show a node (admin, or the node itself)."""
    with call.read() as session:
        return Answer(200, documents.node(accounts.find_user(session, call.caller, call.path["name"], node=True)))


@routes.add("PATCH", "/v1/nodes/{name}", body=NodeUpdate, query=DryRun, answers={200: NodeDocument})
def update_node(call: Call) -> Answer:
    """Change a node's initiator, enable or disable it (admin)."""

    def intend(session: Session) -> Done:
        return Done(
            Answer(200, documents.node(accounts.change_node(session, call.caller, call.path["name"], call.body)))
        )

    return mutate(call, intend)


@routes.add("DELETE", "/v1/nodes/{name}", query=DryRun, answers={204: None})
def delete_node(call: Call) -> Answer:
    """Delete a node that has no attachments (admin)."""

    def intend(session: Session) -> Done:
        accounts.delete_user(session, call.caller, call.path["name"], node=True)
        return Done(Answer(204))

    return mutate(call, intend)


# ---------------------------------------------------------------- tokens


@routes.add("GET", "/v1/tokens", query=Paging, answers={200: TokenPage})
def list_tokens(call: Call) -> Answer:
    """List your API tokens, or everyone's for an admin; never the tokens themselves."""
    with call.read() as session:
        found = accounts.tokens(session, call.caller, call.query)
        return Answer(200, documents.page(TokenPage, found, documents.token))


@routes.add("POST", "/v1/tokens", body=TokenCreate, query=DryRun, answers={201: NewToken},
            links=(Link(201, "delete_token", "id"),))  # fmt: skip
def create_token(call: Call) -> Answer:
    """Create an API token; it is shown this once."""

    def intend(session: Session) -> Done:
        token, text = accounts.add_token(session, call.caller, call.body)
        document = NewToken(**documents.token(token).model_dump(), token=text)
        return Done(Answer(201, document), secret="token")

    return mutate(call, intend)


@routes.add("DELETE", "/v1/tokens/{id}", query=DryRun, answers={204: None})
def delete_token(call: Call) -> Answer:
    """Revoke an API token, at once."""

    def intend(session: Session) -> Done:
        accounts.revoke_token(session, call.caller, call.id)
        return Done(Answer(204))

    return mutate(call, intend)


# ---------------------------------------------------------------- groups


@routes.add("GET", "/v1/groups", query=Paging, answers={200: GroupPage})
def list_groups(call: Call) -> Answer:
    """List your groups, or all for an admin."""
    with call.read() as session:
        found = accounts.groups(session, call.caller, call.query)
        return Answer(200, documents.page(GroupPage, found, lambda group: documents.group(session, group)))


@routes.add("POST", "/v1/groups", body=GroupCreate, query=DryRun, answers={201: GroupDocument},
            headers=LOCATION, links=_links("get_group", "update_group", "delete_group"))  # fmt: skip
def create_group(call: Call) -> Answer:
    """Create a group without members (admin)."""

    def intend(session: Session) -> Done:
        group = accounts.add_group(session, call.caller, call.body)
        return Done(Answer(201, documents.group(session, group), {"Location": f"/v1/groups/{group.name}"}))

    return mutate(call, intend)


@routes.add("GET", "/v1/groups/{name}", answers={200: GroupDocument})
def get_group(call: Call) -> Answer:
    """Show a group and its members."""
    with call.read() as session:
        return Answer(200, documents.group(session, accounts.find_group(session, call.caller, call.path["name"])))


@routes.add("PUT", "/v1/groups/{name}", body=GroupUpdate, query=DryRun, answers={200: GroupDocument})
def update_group(call: Call) -> Answer:
    """Say who the members of a group are from now on (admin)."""

    def intend(session: Session) -> Done:
        group = accounts.set_members(session, call.caller, call.path["name"], call.body)
        return Done(Answer(200, documents.group(session, group)))

    return mutate(call, intend)


@routes.add("DELETE", "/v1/groups/{name}", query=DryRun, answers={204: None})
def delete_group(call: Call) -> Answer:
    """Delete a group; what was shared with it is no longer (admin)."""

    def intend(session: Session) -> Done:
        accounts.delete_group(session, call.caller, call.path["name"])
        return Done(Answer(204))

    return mutate(call, intend)


# ---------------------------------------------------------------- quotas


@routes.add("GET", "/v1/quotas/{user}", answers={200: QuotaDocument})
def get_quota(call: Call) -> Answer:
    """Show what a user may have and has; yourself, or anyone for an admin."""
    with call.read() as session:
        found = accounts.quota(session, call.service.settings, call.caller, call.path["user"])
        return Answer(200, QuotaDocument.model_validate(found))


@routes.add("PUT", "/v1/quotas/{user}", body=QuotaUpdate, query=DryRun, answers={200: QuotaDocument})
def set_quota(call: Call) -> Answer:
    """Say what a user may have; null is the site's default (admin)."""

    def intend(session: Session) -> Done:
        found = accounts.set_quota(session, call.service.settings, call.caller, call.path["user"], call.body)
        return Done(Answer(200, QuotaDocument.model_validate(found)))

    return mutate(call, intend)
