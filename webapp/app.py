"""The factory of the app."""

from __future__ import annotations

from typing import Final

import flask
from flask import Response
from werkzeug.middleware.proxy_fix import ProxyFix

import mlqueue
from mlqueue.web import create_blueprint, create_dashboard, keys

from . import orders, pages
from .visitors import LOCAL_NAMES, Visitors

#: Where the HTTP interface is.
API: Final = "/api"

#: Where the dashboard is.
DASHBOARD: Final = "/dashboard"

#: The largest picture that is taken, in bytes.
MAX_BODY: Final = 8 * 2**20

#: How many requests of a process may wait for a job at a time, and how many streams it has: each holds one of the 16
#: threads that the Procfile gives it.
MAX_WAITS: Final = 5
MAX_STREAMS: Final = 5

#: What a page may load: what this app has, and nothing that stands in a page itself. `blob:` is the picture that the
#: visitor has just drawn or chosen.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def create_app(mlq: mlqueue.MLQ | None = None) -> flask.Flask:
    """The app, for the namespace of the tasks unless another is given.

    Settings are variables of the environment: ``DIGITS_PASSWORD`` lets visitors in who know it; without it the app
    serves this machine alone. ``DIGITS_PROXIES`` says how many proxies stand before it (one on Heroku).
    """
    app = flask.Flask(__name__)
    app.config.from_mapping(PASSWORD=None, PROXIES=0, MAX_CONTENT_LENGTH=MAX_BODY)
    app.config.from_prefixed_env("DIGITS")
    mlq = mlqueue.MLQ("digits") if mlq is None else mlq

    visitors = Visitors(app.config["PASSWORD"])
    if not app.config["PASSWORD"]:
        app.config["TRUSTED_HOSTS"] = LOCAL_NAMES
    app.before_request(visitors.admit)
    app.after_request(_add_policy)
    # Programs bring a key, which `mlqueue key new --namespace digits` makes; visitors of the pages may submit and read.
    interface = create_blueprint(
        mlq, [keys(mlq), visitors.scopes], max_body=MAX_BODY, max_waits=MAX_WAITS, max_streams=MAX_STREAMS
    )
    app.register_blueprint(interface, url_prefix=API)
    dashboard = create_dashboard(mlq, visitors.scopes, max_streams=MAX_STREAMS)
    app.register_blueprint(dashboard, url_prefix=DASHBOARD)
    app.register_blueprint(pages.blueprint)
    app.register_blueprint(orders.create_blueprint(mlq))
    if app.config["PROXIES"]:
        count = int(app.config["PROXIES"])
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=count, x_proto=count, x_host=count)  # type: ignore[method-assign]
    return app


def _add_policy(response: Response) -> Response:
    # What the blueprint sends has a policy of its own, where it needs one.
    response.headers.setdefault("Content-Security-Policy", POLICY)
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Referrer-Policy", "same-origin")
    return response
