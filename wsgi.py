"""What a WSGI server imports: `gunicorn wsgi:application`, with STRATUS_HOME set."""

from app.factory import create_app

application = create_app()
