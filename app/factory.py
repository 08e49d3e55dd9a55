"""The Flask application of a service."""

from __future__ import annotations

import os
from pathlib import Path

from flask import Flask
from werkzeug.middleware.proxy_fix import ProxyFix

from app import api
from app.config import DEFAULT_HOME, Settings, load, read_effective
from app.service import Service

#: Far more than any request here; what is longer is refused before it is read.
LARGEST_BODY = 256 * 1024


def create_app(settings: Settings | None = None) -> Flask:
    """The application for `settings`, or for what the environment names (`from_environment`)."""
    settings = settings or from_environment()
    app = Flask("stratus-storage", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LARGEST_BODY
    app.json.sort_keys = False  # type: ignore[attr-defined]
    api.install(app, Service(settings, connections=settings.server.threads + 2))
    if settings.server.behind_proxy:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1)  # type: ignore[method-assign]
    return app


def from_environment() -> Settings:
    """STRATUS_EFFECTIVE: what `serve` checked; else STRATUS_HOME and STRATUS_CONFIG as everywhere."""
    effective = os.environ.get("STRATUS_EFFECTIVE")
    if effective:
        return read_effective(Path(effective))
    config = os.environ.get("STRATUS_CONFIG")
    return load(Path(os.environ.get("STRATUS_HOME", DEFAULT_HOME)), Path(config) if config else None)
