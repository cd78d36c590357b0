"""Fixtures: a Flask app with the blueprint, its test client, and API keys."""

from __future__ import annotations

import flask
import pytest
from flask.testing import FlaskClient
from hosting import PREFIX, mounted

from mlqueue import MLQ
from mlqueue.keys import ApiKeys


@pytest.fixture
def app(mlq: MLQ) -> flask.Flask:
    """An app in which everybody may do everything."""
    return mounted(mlq, allow_anonymous=True)


@pytest.fixture
def client(app: flask.Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def keys(mlq: MLQ) -> ApiKeys:
    """The API keys of the test's namespace."""
    return ApiKeys(mlq.store)


__all__ = ["PREFIX"]
