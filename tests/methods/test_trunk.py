"""The trunk that learns labelled images first: it does learn, once, and every tower then starts from it."""

import dataclasses

import numpy as np
import pytest
import torch

from methods.core import trunk as module
from methods.core.trunk import TrunkConfig, with_trunk
from networks.towers import TowerConfig, build_image_tower

CPU = torch.device("cpu")


@pytest.fixture
def labelled(tmp_path):
    """256 noisy images in four flat colours."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 256)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])
    images = (colours[labels][:, None, None] + rng.normal(0, 25, (256, 16, 16, 3))).clip(0, 255).astype(np.uint8)
    np.savez(tmp_path / "labelled.npz", train_images=images, train_labels=labels)
    return str(tmp_path / "labelled.npz")


def towers(**options):
    return TowerConfig(**{"image_encoder": "ConvNetD2W4", "text_encoder": "tfidf", "image_pretrained": False} | options)


def test_none_asked_for(tmp_path):
    cfg = towers()
    assert with_trunk(cfg, TrunkConfig(), 16, tmp_path, CPU) is cfg


def test_it_learns_once_and_all_towers_share_it(tmp_path, labelled, monkeypatch):
    losses = []
    fit = module.Trainer.fit

    def spy(self, batches, loss_fn, what=""):
        fit(self, batches, loss_fn, lambda epoch, loss: losses.append(loss), what)

    monkeypatch.setattr(module.Trainer, "fit", spy)
    cfg = TrunkConfig(labelled, 4, 0.05)
    found = with_trunk(towers(joint_width=8), cfg, 16, tmp_path / "cache", CPU)
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    assert found.joint_width == 8 and dataclasses.replace(found, image_weights="") == towers(joint_width=8)
    first, second = (build_image_tower(found, 16, seed).trunk.state_dict() for seed in (1, 2))
    fresh = build_image_tower(towers(), 16, 1).trunk.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], fresh[name]) for name in first)

    assert with_trunk(towers(joint_width=8), cfg, 16, tmp_path / "cache", CPU) == found
    assert with_trunk(towers(), cfg, 16, tmp_path / "cache", CPU).image_weights == found.image_weights
    assert len(losses) == 4  # from the cache
    # Whoever comes first leaves the same: no head stands between the trunk and the classes.
    again = with_trunk(towers(image_trainable=False, image_projection=True), cfg, 16, tmp_path / "elsewhere", CPU)
    third = build_image_tower(again, 16, 0).trunk.state_dict()
    assert all(torch.equal(first[name], third[name]) for name in first)


def test_other_settings_train_another(tmp_path, labelled):
    cfg = TrunkConfig(labelled, 1, 0.05)
    paths = {
        with_trunk(towers(**options), dataclasses.replace(cfg, **change), size, tmp_path / "cache", CPU).image_weights
        for options, change, size in (
            ({}, {}, 16),
            ({}, {"trunk_epochs": 2}, 16),
            ({}, {"trunk_lr": 0.01}, 16),
            ({}, {}, 8),
            ({"image_encoder": "ConvNetD2W6"}, {}, 16),
        )
    }
    assert len(paths) == 5


def test_features_and_logits_are_not_confused(tmp_path, labelled):
    """A network with its classes has weights that one without them lacks."""
    cfg = TrunkConfig(labelled, 1, 0.01)
    for output in ("features", "logits"):
        found = with_trunk(towers(image_encoder="test_nfnet", image_output=output), cfg, 32, tmp_path, CPU)
        assert build_image_tower(found, 32, 0).width > 0


def test_other_weights_to_start_from_train_another(tmp_path, labelled):
    cfg, paths = TrunkConfig(labelled, 1, 0.01), set()
    for seed in (1, 2):
        weights = build_image_tower(towers(), 16, seed).trunk.state_dict()
        torch.save(weights, tmp_path / "start.pt")  # the same name each time
        paths.add(with_trunk(towers(image_weights=str(tmp_path / "start.pt")), cfg, 16, tmp_path, CPU).image_weights)
    assert len(paths) == 2


def test_moved_and_mirrored():
    images = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16).repeat(40, 1, 1, 1)
    rng = torch.Generator().manual_seed(0)
    moved = module._shift_and_flip(images, rng)
    assert moved.shape == images.shape
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    seen = set()
    for before, after in zip(padded, moved, strict=True):
        ways = set()
        for down in range(5):
            for right in range(5):
                part = before[:, down : down + 16, right : right + 16]
                ways |= {
                    (down, right, flip) for flip in (False, True) if torch.equal(after, part.flip(2) if flip else part)
                }
        assert len(ways) == 1
        seen |= ways
    assert {flip for _, _, flip in seen} == {False, True} and len(seen) > 20
