"""HTTP as stores, and what stands between, speak it."""

import socket
import threading
import time

import pytest

from launcher.storage import connections


def test_patience_with_an_answer_begins_when_all_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 0.5)
    body = b"x" * (32 << 20)  # more than the kernel keeps on its way
    with socket.create_server(("127.0.0.1", 0)) as server:

        def slow() -> None:
            client, _ = server.accept()
            with client, client.makefile("rb") as file:
                time.sleep(1.0)
                while file.readline() != b"\r\n":
                    pass
                file.read(len(body))
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=slow)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/key"
        with connections.Connections(None).exchange("PUT", url, {}, body) as answer:
            assert answer.status == 200
        thread.join()
