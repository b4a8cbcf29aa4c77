"""Object stores that run on this machine: three servers, each behind a free port of 127.0.0.1, with a bucket."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUCKET = "caches"
KEY_ID = "a-key-id"
SECRET = "a-secret-key-nobody-may-see"  # noqa: S105 - of servers that live as long as the tests
SERVERS = ("localbucket", "moto", "nanio")
ROOT = Path(__file__).parents[1]
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class ObjectServer:
    """A server that runs, and whether it honours If-None-Match."""

    name: str
    endpoint: str

    @property
    def honours_create_only(self) -> bool:
        return self.name != "nanio"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def new_address(self) -> str:
        """Give an address in the bucket that nothing was written to."""
        return f"s3://{BUCKET}/run-{os.getpid()}/{next(_NUMBERS)}"


@contextlib.contextmanager
def running(name: str, folder: Path) -> Iterator[ObjectServer]:
    """Run a server that keeps its objects in a folder, and stop it afterwards."""
    (folder / BUCKET).mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "NANIO_ACCESS_KEY": KEY_ID, "NANIO_SECRET_KEY": SECRET}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command_of(name, folder, port), env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        try:
            server = ObjectServer(name, f"http://127.0.0.1:{port}")
            wait_for(server, process, folder / "log.txt")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def command_of(name: str, folder: Path, port: int) -> list[str]:
    beside = Path(sys.executable).parent
    if name == "moto":
        return [str(servers_venv() / "bin" / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    if name == "localbucket":
        return [str(beside / "localbucket"), str(folder), "--port", str(port)]
    return [str(beside / name), "serve", "--data-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)]


def wait_for(server: ObjectServer, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers; moto, which keeps objects in memory, is given its bucket."""
    deadline = time.monotonic() + 60
    request = urllib.request.Request(f"{server.endpoint}/{BUCKET}", method="PUT", data=b"")  # noqa: S310 - our own
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{server.name} did not start:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(request, timeout=10):  # noqa: S310 - our own
                return
        except urllib.error.HTTPError as refusal:  # the bucket is a folder that stands already
            refusal.close()
            return
        except OSError:
            time.sleep(0.05)


def servers_venv() -> Path:
    """Give the environment of the server whose packages exclude kdcache's; make it where it does not stand."""
    venv = ROOT / ".venv-servers"
    wanted = (ROOT / "tests" / "servers-requirements.txt").read_text()
    ready = venv / ".ready"
    with (ROOT / ".venv-servers.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists() or ready.read_text() != wanted:
            pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
            subprocess.run([*pip, "--no-deps", "-r", "tests/servers-requirements.txt"], check=True, cwd=ROOT)
            ready.write_text(wanted)
    return venv


if __name__ == "__main__":
    servers_venv()
