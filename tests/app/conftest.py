"""What the tests of the service's inside share."""

from __future__ import annotations

from tests.support.databases import database as database
from tests.support.databases import database_url as database_url
from tests.support.databases import postgres as postgres
from tests.support.databases import postgres_template as postgres_template
from tests.support.databases import sqlite_template as sqlite_template
