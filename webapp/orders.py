"""An app with records of its own: orders, each of which a job fulfils, and whose end the app hears of by a callback.

This is the workflow that MLQ was made for. Who orders gets an answer at once; the order's page shows "processing"; a
worker, a process of its own, runs the job; when it has ended a worker fetches the callback's URL, which is a route of
this app, and that marks the order as done. The page asks the app how the order stands, and shows its short result.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from typing import Any, Final

import flask
from flask import Blueprint, Response, abort, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as BaseResponse

import mlqueue
from mlqueue.job import new_id

#: How long an order is kept, in seconds.
KEPT: Final = 86400

#: The most epochs that can be ordered.
MOST_EPOCHS: Final = 50


class Orders:
    """The app's own records. A real app has a database; here the data of the namespace will do, which all processes of
    the app see."""

    def __init__(self, mlq: mlqueue.MLQ) -> None:
        self._data = mlq.data

    def read(self, order_id: str) -> dict[str, Any]:
        """An order. Answers 404 when there is none."""
        data = self._data.get(f"order:{order_id}") if re.fullmatch(r"[\w-]{16,64}", order_id) else None
        if data is None:
            abort(404, "There is no such order, or it is older than a day.")
        order: dict[str, Any] = json.loads(data)
        return order

    def write(self, order: dict[str, Any]) -> None:
        """Keeps an order."""
        self._data.put(json.dumps(order), f"order:{order['id']}", KEPT)


def create_blueprint(mlq: mlqueue.MLQ) -> Blueprint:
    """The routes of orders."""
    blueprint = Blueprint("orders", __name__, url_prefix="/orders")
    orders = Orders(mlq)

    @blueprint.get("")
    def show_form() -> str:
        return render_template("orders.html", most=MOST_EPOCHS)

    @blueprint.post("")
    def take_order() -> BaseResponse:
        """Answers at once: the order is written down and its job exists."""
        name = request.form.get("name", "").strip()[:60] or "A model"
        epochs = request.form.get("epochs", type=int)
        if epochs is None or not 1 <= epochs <= MOST_EPOCHS:
            abort(400, f"The number of epochs must be from 1 to {MOST_EPOCHS}.")
        order = {
            "id": secrets.token_urlsafe(16),
            # Who calls back proves by it that the call is about this order.
            "token": secrets.token_urlsafe(16),
            "name": name,
            "state": "processing",
            "short_result": None,
            # The id is chosen here: the order is written before its job exists, which could end before it was.
            "job_id": new_id(),
        }
        orders.write(order)
        done = url_for(".receive_callback", order_id=order["id"], token=order["token"], _external=True)
        mlq.submit("train_digits", epochs=epochs, hidden=64, job_id=order["job_id"], callback=done, queue_name="train")
        return redirect(url_for(".show_order", order_id=order["id"]), 303)

    @blueprint.get("/<order_id>")
    def show_order(order_id: str) -> str:
        return render_template("order.html", order=orders.read(order_id))

    @blueprint.get("/<order_id>/state")
    def read_state(order_id: str) -> Response:
        """How it stands, for the page."""
        order = orders.read(order_id)
        response = flask.jsonify(state=order["state"], short_result=order["short_result"])
        response.headers["Cache-Control"] = "no-store"
        return response

    @blueprint.get("/<order_id>/done")
    def receive_callback(order_id: str) -> str:
        """Called by a worker when the job has ended: ``success``, ``job_id`` and ``short_result`` are in the query. It
        may come twice."""
        order = orders.read(order_id)
        told = request.args
        if not hmac.compare_digest(told.get("token", "").encode(), order["token"].encode()):
            abort(403)
        if told.get("job_id") != order["job_id"]:
            abort(400)
        order["state"] = "done" if told.get("success") == "1" else "failed"
        order["short_result"] = told.get("short_result", "")
        orders.write(order)
        return "thank you\n"

    return blueprint
