"""No test here may reach a model hub, and none may wait for one."""

import pytest


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    """An empty hub cache, so that a test means the same on a machine that has weights."""
    from huggingface_hub import constants

    empty = str(tmp_path_factory.mktemp("hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", empty)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
