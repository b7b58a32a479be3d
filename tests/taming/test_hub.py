"""Who gets to see a user's token for the hub; the downloads themselves are in tests/scripts/test_download.py."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from taming import hub
from taming.util import user_cache


@pytest.fixture
def serve(monkeypatch):
    """Starts servers that note the `Authorization` of what they are asked, and redirect to `location` if there is one."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    running = []

    def start(location=None):
        class Answer(BaseHTTPRequestHandler):
            seen: list = []

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.seen.append(self.headers.get("Authorization"))
                self.send_response(302 if location else 200)
                if location:
                    self.send_header("Location", location)
                else:
                    self.send_header("X-Linked-Etag", "a" * 64)
                self.end_headers()

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}", Answer.seen

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("token", ["secret", None])
def test_the_token_is_sent_to_the_hub_and_to_no_host_that_a_redirection_names(serve, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
    storage, of_storage = serve()
    home, of_hub = serve(f"{storage}/file")
    monkeypatch.setattr(hub, "HUB", home)
    assert hub.published_sha256(f"{home}/a/resolve/main/b") == "a" * 64
    assert of_hub == [token and f"Bearer {token}"] and of_storage == [None]


def test_a_host_that_only_begins_as_the_hub_does_is_another(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert hub._token(f"{hub.HUB}/x") == {"Authorization": "Bearer secret"}
    for other in (f"{hub.HUB}.example.org/x", f"{hub.HUB}@example.org/x", "http://huggingface.co/x"):
        assert hub._token(other) == {}


def test_fetched_files_are_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(hub.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / "latent-generative-models"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", None):
        monkeypatch.setenv("XDG_CACHE_HOME", "") if unset == "" else monkeypatch.delenv("XDG_CACHE_HOME")
        assert user_cache() == tmp_path / ".cache"
