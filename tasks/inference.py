"""Inference with a network that `train_digits` has trained, on whatever machine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import mlqueue
from mlqueue import codec

from .app import mlq
from .data import SIDE
from .network import Network
from .pictures import image_of
from .training import LATEST_MODEL, model_key


@mlq.actor(queue_name="predict", throws=ValueError, http=True)
def predict_digits(images: NDArray[Any], model: str | None = None) -> dict[str, NDArray[Any]]:
    """What the images show.

    Parameters:
      images: Shape (n, 8, 8), from 0 (paper) to 1 (ink).
      model: The id of the job that trained the network; the newest model when None.

    Returns:
      ``digits``, int64 of shape (n,), and ``confidence``, float32 of shape (n,): the probability of each digit.
    """
    images = np.asarray(images)
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"images of shape {images.shape}: it must be (n, {SIDE}, {SIDE}).")
    network = load_network(model)
    probabilities = network.probabilities(images)
    return {"digits": probabilities.argmax(axis=1), "confidence": probabilities.max(axis=1)}


@mlq.actor(queue_name="predict", throws=ValueError, http=True, result_ttl=86400)
def classify_digit(picture: bytes, model: str | None = None) -> mlqueue.Result:
    """What digit a picture shows, as people upload or draw it (see `tasks.pictures.image_of`).

    The short result is the digit, the full one a dict: ``digit``, ``confidence``, ``probabilities`` (of the ten
    digits), and ``image``, what the network saw: eight rows of eight numbers from 0 (paper) to 1 (ink).
    """
    image = image_of(picture)
    probabilities = load_network(model).probabilities(image[np.newaxis])[0]
    digit = int(probabilities.argmax())
    found = {
        "digit": digit,
        "confidence": float(probabilities[digit]),
        "probabilities": probabilities.tolist(),
        "image": image.tolist(),
    }
    return mlqueue.Result(short=digit, full=found)


def load_network(model: str | None) -> Network:
    """The network that the job `model` has trained, or the newest one. Only inside a job."""
    job = mlqueue.current_job()
    if model is None:
        latest = job.fetch_data(LATEST_MODEL)
        if latest is None:
            raise ValueError("no model has been trained yet: submit train_digits first.")
        model = latest.decode()
    data = job.fetch_data(model_key(model))
    if data is None:
        raise ValueError(f"no model of job {model!r}: it never ended well, or was trained more than 30 days ago.")
    return Network(codec.decode(data)["parameters"])
