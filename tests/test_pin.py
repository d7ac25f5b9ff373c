"""`make pin` against a registry that speaks the distribution API, token and all, on loopback."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
INDEX = "application/vnd.oci.image.index.v1+json"
BODY = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}).encode()
DIGEST = f"sha256:{hashlib.sha256(BODY).hexdigest()}"


class Registry(BaseHTTPRequestHandler):
    """One repository, team/tool, with one tag; `claim` is what it calls its manifest."""

    claim = DIGEST

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        port = self.server.server_address[1]
        if url.path == "/token":
            asked = parse_qs(url.query)
            assert asked == {"service": ["here"], "scope": ["repository:team/tool:pull"]}
            self.reply(200, json.dumps({"token": "t0"}).encode())
        elif self.headers.get("Authorization") != "Bearer t0":
            challenge = f'Bearer realm="http://127.0.0.1:{port}/token",service="here",scope="repository:team/tool:pull"'
            self.reply(401, b"{}", ("WWW-Authenticate", challenge))
        elif url.path != "/v2/team/tool/manifests/v1.2.3" or INDEX not in self.headers["Accept"]:
            self.reply(404, b"{}")
        else:
            self.reply(200, BODY, ("Docker-Content-Digest", self.claim))

    def reply(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def registry() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def pin(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "docker/pin.py", str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"no_proxy": "127.0.0.1"})


def test_every_image_gets_the_digest_of_its_tag_and_the_rest_stays(tmp_path: Path, registry: str) -> None:
    file = tmp_path / ".env"
    content = f"# text\nA_IMAGE={registry}/team/tool:v1.2.3\nCLIENTS=2\nB_IMAGE={registry}/team/tool:v1.2.3"
    file.write_text(f"{content}@sha256:{'0' * 64}\n")
    ended = pin(file)
    assert ended.returncode == 0, ended.stderr
    image = f"{registry}/team/tool:v1.2.3@{DIGEST}"
    assert file.read_text() == f"# text\nA_IMAGE={image}\nCLIENTS=2\nB_IMAGE={image}\n"
    assert ended.stdout == f"{image}\n" * 2


def test_an_image_that_is_not_there_changes_nothing(tmp_path: Path, registry: str) -> None:
    file = tmp_path / ".env"
    content = f"A_IMAGE={registry}/team/tool:v1.2.3\nB_IMAGE={registry}/team/tool:v9\n"
    file.write_text(content)
    ended = pin(file)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"make pin: {registry}/team/tool:v9: ")
    assert "404" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert file.read_text() == content


def test_a_registry_that_misnames_a_manifest_is_not_believed(
    tmp_path: Path, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "claim", f"sha256:{'0' * 64}")
    file = tmp_path / ".env"
    file.write_text(f"A_IMAGE={registry}/team/tool:v1.2.3\n")
    ended = pin(file)
    assert ended.returncode == 1
    assert DIGEST in ended.stderr
    assert "@" not in file.read_text()


def test_an_image_without_a_tag_is_named(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("A_IMAGE=prom/prometheus\n")
    ended = pin(file)
    assert ended.returncode == 1
    assert ended.stderr == "make pin: prom/prometheus: expected NAME:TAG, as prom/prometheus:v3.13.3\n"


@pytest.mark.parametrize(
    ("image", "where"),
    [
        ("ubuntu:24.04", ("registry-1.docker.io", "library/ubuntu", "24.04")),
        ("nvidia/cuda:13.2.1-base-ubuntu24.04", ("registry-1.docker.io", "nvidia/cuda", "13.2.1-base-ubuntu24.04")),
        ("nvcr.io/nvidia/cuda:13.2.1", ("nvcr.io", "nvidia/cuda", "13.2.1")),
        ("localhost:5000/a/b/c:1", ("localhost:5000", "a/b/c", "1")),
        ("quay.io/a/b:v1@sha256:" + "0" * 64, ("quay.io", "a/b", "v1")),
    ],
)
def test_names_are_read_as_docker_reads_them(image: str, where: tuple[str, str, str]) -> None:
    code = "import sys, pin; r = pin.Reference.parse(sys.argv[1]); print(r.registry, r.repository, r.tag)"
    shown = subprocess.check_output([sys.executable, "-c", code, image], cwd=ROOT / "docker", text=True)
    assert tuple(shown.split()) == where
