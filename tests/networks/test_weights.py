"""Whether there is a hub, and what is said when there is one without what was asked for."""

import http.server
import threading

import pytest
from huggingface_hub import constants

from networks.weights import from_cache_or_hub, hub_reachable
from utils.errors import UserError


class _Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers, though it has nothing."""
    server = http.server.HTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def test_a_refusal_is_an_answer(hub, monkeypatch):
    assert hub_reachable()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_reachable(), "the user's wish to stay offline counts"


def test_nobody_answers(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for endpoint in ("http://127.0.0.1:9", "http://no-such-host.invalid", "nonsense"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert not hub_reachable()


def test_cache_first_then_hub(hub):
    asked = []

    def load(local, found):
        asked.append(local)
        if local or not found:
            raise OSError("404\nand much more")
        return "weights"

    assert from_cache_or_hub(lambda local: local, "weights", "do this") is True
    assert from_cache_or_hub(lambda local: load(local, True), "weights", "do this") == "weights"
    assert asked == [True, False]
    with pytest.raises(UserError) as caught:
        from_cache_or_hub(lambda local: load(local, False), "weights", "do this")
    assert str(caught.value) == "weights cannot be had from the hub (404); do this"
