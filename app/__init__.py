"""The service: an HTTP API over a database of intentions, and a worker that makes them so.

Only this package knows Flask and SQLAlchemy. Its arrows: `api` → services (`volumes`, `attachments`, …) → `models`;
`worker` and `reconcile` → `steps` → the rooms outside (`pools`, `iscsi`). API processes touch nothing but the database.
"""
