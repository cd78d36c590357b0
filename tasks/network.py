"""A multi-layer perceptron in NumPy: two hidden layers of rectifiers, a softmax, and gradient descent with momentum."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import CLASSES, SIDE

Array = NDArray[np.float32]


class Network:
    """The weights and biases, layer by layer, and the optimizer's velocities.

    Parameters:
      parameters: Weights of shape (inputs, outputs) and biases of shape (outputs,), in turn, from the first layer on.
      velocities: As the parameters; zeros when None.
    """

    def __init__(self, parameters: Sequence[NDArray[Any]], velocities: Sequence[NDArray[Any]] | None = None) -> None:
        # Copies: arrays from a checkpoint are read-only.
        self.parameters = [np.array(value, dtype=np.float32) for value in parameters]
        if velocities is None:
            self.velocities = [np.zeros_like(value) for value in self.parameters]
        else:
            self.velocities = [np.array(value, dtype=np.float32) for value in velocities]

    @classmethod
    def new(cls, hidden: int, generator: np.random.Generator) -> Network:
        """An untrained network (He initialization) with two hidden layers of `hidden` units."""
        sizes = [SIDE * SIDE, hidden, hidden, CLASSES]
        parameters: list[NDArray[Any]] = []
        for inputs, outputs in itertools.pairwise(sizes):
            parameters.append(generator.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs))
            parameters.append(np.zeros(outputs))
        return cls(parameters)

    def probabilities(self, images: NDArray[Any]) -> Array:
        """The probability of each class for each image: shape (n, 10)."""
        return self._forward(images)[-1]

    def step(self, images: NDArray[Any], labels: NDArray[np.int64], lr: float, momentum: float = 0.9) -> float:
        """One step of gradient descent on a mini-batch; the mean cross-entropy before it."""
        layers = self._forward(images)
        rows = np.arange(len(labels))
        loss = -float(np.log(layers[-1][rows, labels] + 1e-9).mean())
        slope = layers[-1].copy()
        slope[rows, labels] -= 1
        slope /= len(labels)
        gradients: list[Array] = []
        for layer in reversed(range(len(self.parameters) // 2)):
            gradients[:0] = [layers[layer].T @ slope, slope.sum(axis=0)]
            if layer:
                slope = (slope @ self.parameters[2 * layer].T) * (layers[layer] > 0)
        for parameter, velocity, gradient in zip(self.parameters, self.velocities, gradients, strict=True):
            velocity *= momentum
            velocity -= lr * gradient
            parameter += velocity
        return loss

    def _forward(self, images: NDArray[Any]) -> list[Array]:
        """What goes into each layer, and at the end what comes out of the last one."""
        values = [np.asarray(images, dtype=np.float32).reshape(len(images), -1)]
        *hidden, weights, bias = self.parameters
        for i in range(0, len(hidden), 2):
            values.append(np.maximum(values[-1] @ hidden[i] + hidden[i + 1], 0))
        scores = values[-1] @ weights + bias
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return [*values, powers / powers.sum(axis=1, keepdims=True)]
