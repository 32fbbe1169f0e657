"""Classifiers older than the ConvNet: a small perceptron on the pixels."""

from __future__ import annotations

from torch import nn

from networks.layers import Classifier


def build_mlp(name: str, image_size: int, num_classes: int | None = None, channels: int = 3) -> Classifier:
    """A perceptron on the pixels with two hidden layers of 128 units, the last of which are its features."""
    pixels = channels * image_size**2
    layers = (nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    return Classifier(nn.Sequential(*layers), 128, num_classes)
