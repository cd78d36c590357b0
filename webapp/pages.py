"""The pages that only show something: what they do, they do through the HTTP interface, by their scripts."""

from __future__ import annotations

import flask
from flask import Blueprint

blueprint = Blueprint("pages", __name__)


@blueprint.get("/")
def show_classify() -> str:
    """Draw a digit, or upload a picture of one, and have it recognized."""
    return flask.render_template("classify.html")


@blueprint.get("/training")
def show_training() -> str:
    """Start a training and watch it; the page of a training that runs is ``/training#ID``."""
    return flask.render_template("training.html")
