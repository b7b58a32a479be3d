"""Downloads from a small server on this machine that speaks as the Hugging Face hub does."""

import hashlib
import importlib
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from taming import hub, util

CONTENTS = bytes(range(256)) * 2000
SUM = hashlib.sha256(CONTENTS).hexdigest()


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    return importlib.import_module("scripts.download")


class Hub(BaseHTTPRequestHandler):
    """Redirects to its files, says their SHA-256 in the redirection, and knows ranges."""

    breaks_after = None  # bytes
    sha256 = SUM
    ranges: list = []

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        if "missing" in self.path:
            self.send_error(404)
            return
        if "/resolve/" in self.path:
            self.send_response(302)
            self.send_header("X-Linked-Etag", f'"{self.sha256}"')
            self.send_header("Location", "/storage/file")
            self.end_headers()
            return
        given = self.headers.get("Range")
        start = int(given.removeprefix("bytes=").rstrip("-")) if given else 0
        type(self).ranges.append(start)
        if start >= len(CONTENTS):
            self.send_error(416)
            return
        self.send_response(206 if given else 200)
        self.send_header("Content-Length", str(len(CONTENTS) - start))
        self.end_headers()
        if body:
            self.wfile.write(CONTENTS[start : self.breaks_after])


@pytest.fixture
def server(monkeypatch, tmp_path):
    handler = type("Handler", (Hub,), {"ranges": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setattr(hub, "HUB", f"http://127.0.0.1:{running.server_port}")
    monkeypatch.setenv(hub.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield handler
    running.shutdown()
    running.server_close()


def test_a_known_name_becomes_a_verified_file_in_the_cache_folder(server, script, tmp_path, capsys):
    assert script.main(["sd-v1-4"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "cache" / "CompVis--stable-diffusion-v-1-4-original" / "sd-v1-4.ckpt"
    assert path.read_bytes() == CONTENTS and [p.name for p in path.parent.iterdir()] == ["sd-v1-4.ckpt"]
    asked = len(server.ranges)
    assert script.main(["sd-v1-4"]) == 0 and len(server.ranges) == asked  # it is there
    assert script.main(["sd-v1-4", "--check"]) == 0
    path.write_bytes(b"broken")
    assert script.main(["sd-v1-4", "--check"]) == 1
    assert "remove it and fetch it again" in capsys.readouterr().err


def test_a_broken_download_is_resumed(server, script, tmp_path, capsys):
    server.breaks_after = 100_000
    assert script.main(["svd"]) == 1
    error = capsys.readouterr().err
    assert "the connection broke after 100,000 of 512,000 bytes" in error and "put it at" in error
    assert not list((tmp_path / "cache").rglob("svd.safetensors"))
    server.breaks_after = None
    assert script.main(["svd"]) == 0
    assert server.ranges == [0, 100_000]
    assert Path(capsys.readouterr().out.strip()).read_bytes() == CONTENTS


def test_a_file_that_is_all_there_but_for_its_name_is_not_fetched_again(server, tmp_path):
    target = tmp_path / "weights.bin"
    target.with_name(".weights.bin.download").write_bytes(CONTENTS)
    util.download(f"{hub.HUB}/storage/file", target, sha256=SUM)
    assert target.read_bytes() == CONTENTS


def test_a_wrong_file_is_removed(server, script, tmp_path, capsys):
    server.sha256 = "0" * 64
    assert script.main(["svd"]) == 1
    assert f"SHA-256 {SUM} instead of {'0' * 64}; it was removed" in capsys.readouterr().err
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_what_cannot_be_fetched_says_which_file_to_put_where(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hub, "HUB", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert script.main(["sdxl-base", "--folder", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "SDXL 1.0, base could not be fetched" in error and "Fetch sd_xl_base_1.0.safetensors of" in error
    assert str(tmp_path / "stabilityai--stable-diffusion-xl-base-1.0" / "sd_xl_base_1.0.safetensors") in error


def test_names_are_listed_and_misspelt_ones_corrected(script, tmp_path, capsys):
    assert script.main(["--list", "--folder", str(tmp_path)]) == 0
    assert "sdxl-refiner" in capsys.readouterr().out
    assert script.main(["sdxl-bse"]) == 2
    assert "Did you mean 'sdxl-base'" in capsys.readouterr().err
