"""The HTTP interface as a Flask blueprint: a guest in any Flask app.

::

    from mlqueue import MLQ
    from mlqueue.web import create_blueprint, keys

    def create_app():
        app = flask.Flask(__name__)
        mlq = MLQ("vision")
        app.register_blueprint(create_blueprint(mlq, keys(mlq)), url_prefix="/jobs-api")
        return app

It needs no task code: jobs are submitted by name. It touches nothing of the host but ``app.extensions["mlqueue"]``.
"""

from __future__ import annotations

from ..errors import MissingDependency

try:
    import flask as _flask
except ImportError as error:
    raise MissingDependency("mlqueue.web needs Flask, which is not installed: pip install 'mlqueue[web]'.") from error

from .auth import Principal, keys
from .blueprint import create_blueprint
from .dashboard import create_dashboard

__all__ = ["Principal", "create_blueprint", "create_dashboard", "keys"]

del _flask
