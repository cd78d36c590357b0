"""A Flask app that works with mlqueue as yours may: the HTTP interface is under ``/api``, the pages are its own.

`gunicorn 'webapp:create_app()'` serves it, `mlqueue worker tasks` runs its jobs. It imports none of the tasks: it
submits jobs by name.
"""

from __future__ import annotations

from .app import create_app

__all__ = ["create_app"]
