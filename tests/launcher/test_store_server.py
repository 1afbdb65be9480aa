"""`launch store serve`: a server that is ours alone, keeps what it has, and leaves nothing behind."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from launcher.errors import UserError
from launcher.storage import server as store_server
from tests.launcher.store_fixture import SERVE, Weed, weed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with weed(tmp_path_factory.mktemp("store") / "a folder") as server:
        yield server


def weeds(server: Weed) -> list[psutil.Process]:
    assert server.process is not None
    return psutil.Process(server.process.pid).children(recursive=True)


def wait_gone(processes: list[psutil.Process], seconds: float = 30) -> None:
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def ours(*processes: psutil.Process) -> list[int]:
    return [
        c.laddr.port for p in processes for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN
    ]


def test_it_is_private(server: Weed) -> None:
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
    for name in ("credentials", "s3.json", "env.sh", "port"):
        assert stat.S_IMODE((server.folder / name).stat().st_mode) == 0o600, name
    assert (server.folder / ".gitignore").read_text() == "*\n", "nor does `git add` take it"
    for process in weeds(server):
        for listening in process.net_connections("tcp"):
            if listening.status == psutil.CONN_LISTEN:
                assert listening.laddr.ip == "127.0.0.1", "nothing listens beyond this machine"
        assert server.secret not in " ".join(process.cmdline())
    assert server.secret not in (server.folder / "env.sh").read_text()
    for log in [server.folder / "weed.log", *server.folder.glob("*.log.*")]:
        assert server.secret.encode() not in log.read_bytes(), log


def test_env_sh_is_all_that_a_shell_needs(server: Weed, tmp_path: Path) -> None:
    """Also in a shell that has settings for another store."""
    code = (
        "import os; from launcher.storage import open_store; "
        "s = open_store(os.environ['LAUNCH_STORAGE'] + '/shell'); "
        "s.put_bytes('k', b'v'); print(s.get_bytes('k')[0])"
    )
    others = {"AWS_ACCESS_KEY_ID": "other", "AWS_SECRET_ACCESS_KEY": "other", "AWS_PROFILE": "other"}
    script = f'. "$1" && exec "{sys.executable}" -c "$2"'
    argv = ["bash", "-euc", script, "bash", str(server.env_sh), code]
    assert subprocess.check_output(argv, text=True, env=os.environ | others) == "b'v'\n"


def test_it_keeps_data_credentials_and_port(server: Weed, monkeypatch: pytest.MonkeyPatch) -> None:
    server.use(monkeypatch)
    store, env, secret = server.store("kept"), server.env, server.secret
    store.put_bytes("key", b"value")
    process, inside = psutil.Process(server.process.pid if server.process else 0), weeds(server)
    ports = ours(*inside)
    server.stop()
    wait_gone([process, *inside])
    assert not [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]
    server.start()
    assert store.get_bytes("key")[0] == b"value"
    assert (server.env, server.secret) == (env, secret)


def test_one_server_a_folder(server: Weed) -> None:
    with pytest.raises(UserError, match="is being served already"):
        store_server.serve(server.folder)
    assert server.env_sh.exists()


def test_killed_it_leaves_no_server_behind(server: Weed) -> None:
    inside = weeds(server)
    server.kill()
    wait_gone(inside)
    server.start()


def test_it_ends_with_its_parent_unless_told_otherwise(tmp_path: Path) -> None:
    def start(nohup: str, folder: Path) -> tuple["subprocess.Popen[bytes]", psutil.Process]:
        script = f'{nohup} "{sys.executable}" -c "$1" "$2" >"$2.log" 2>&1 & echo $!; read wait'
        argv = ["bash", "-c", script, "bash", SERVE, str(folder)]
        shell = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert shell.stdout is not None
        return shell, psutil.Process(int(shell.stdout.readline()))

    everyone = []
    for shell, process in [start("", tmp_path / "a"), start("nohup", tmp_path / "b")]:
        wait((tmp_path / "ab"[len(everyone)] / "env.sh").exists)
        everyone.append([process, *process.children(recursive=True)])
        shell.kill()
        shell.communicate()
    wait_gone(everyone[0])
    assert all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in everyone[1])
    everyone[1][0].send_signal(signal.SIGTERM)
    wait_gone(everyone[1])


def wait(check: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_its_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (tmp_path / "port").write_text(f"{port}\n")
        with pytest.raises(
            UserError, match=f"port {port}, which this store has used before, is taken"
        ) as caught:
            store_server.serve(tmp_path)
    assert str(tmp_path / "port") in caught.value.hint


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files(name: str) -> list[metadata.PackagePath]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", files)
    with pytest.raises(UserError, match="not installed") as caught:
        store_server.serve(tmp_path / "store")
    assert "pip install 'launch-detcore[store]'" in caught.value.hint
    assert not (tmp_path / "store").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot hold a store"):
        store_server.serve(tmp_path / "file")
