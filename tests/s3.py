"""A real S3 server on loopback (moto), reached through a TCP proxy that counts bytes and can be cut.

    with s3_server() as server:
        store = Store(server.new_bucket())
        server.cut()        # from now on nobody answers
        server.mend()       # the same server with all it holds, on the same port

Nothing leaves the machine, and the credentials are invented. They are handed over as a user does it, by fsspec's
variables: child processes read them at their start, for this process they are put where reading them would have.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import urllib.request
import uuid
from collections.abc import Iterator

import fsspec
from fsspec.config import conf, set_conf_env

KEY, SECRET = "loopback-key", "loopback-secret"


class Proxy:
    """Forwards a port of its own to a server's; counts what passes, and can be cut and mended.

    Attributes:
        port: on loopback, the same for ever.
        sent, received: bytes towards the server and from it, headers included.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.port = 0
        self.sent = self.received = 0
        self.mend()

    def mend(self) -> None:
        """Answer again, on the same port."""
        if self._listener is not None:
            return
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Refuse new connections and break those that are open."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
            listener.close()
        with self._lock:
            broken, self._open = self._open, set()
        for one in broken:
            _end(one)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            with self._lock:
                if self._listener is not listener:
                    _end(client)
                    _end(server)
                    return
                self._open |= {client, server}
            for source, sink, name in ((client, server, "sent"), (server, client, "received")):
                threading.Thread(target=self._pump, args=(source, sink, name), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
                with self._lock:
                    setattr(self, name, getattr(self, name) + len(data))
        except OSError:
            pass
        finally:
            with self._lock:
                self._open -= {source, sink}
            _end(source)
            _end(sink)


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


class S3Server:
    """The server as tests see it."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.endpoint = f"http://127.0.0.1:{proxy.port}"
        self.environment = {
            "FSSPEC_S3_ENDPOINT_URL": self.endpoint,
            "FSSPEC_S3_KEY": KEY,
            "FSSPEC_S3_SECRET": SECRET,
        }

    def new_bucket(self) -> str:
        """URL of a folder in a bucket that did not exist before."""
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        fsspec.filesystem("s3").mkdir(bucket)
        return f"s3://{bucket}/store"

    def cut(self) -> None:
        """Nobody answers from now on."""
        self.proxy.cut()

    def mend(self) -> None:
        """Answer again."""
        self.proxy.mend()

    @contextlib.contextmanager
    def down_for(self, seconds: float) -> Iterator[None]:
        """Be down from now on and for some seconds, whatever is done meanwhile."""
        self.cut()
        timer = threading.Timer(seconds, self.mend)
        timer.start()
        try:
            yield
        finally:
            timer.join()

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Know nobody's credentials for a while."""
        self._check_credentials(b"0")
        try:
            yield
        finally:
            self._check_credentials(b"Infinity")

    def _check_credentials(self, after_requests: bytes) -> None:
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.endpoint}/moto-api/reset-auth", after_requests, headers)
        urllib.request.urlopen(request).close()


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start the server and make it the one that ``s3://`` means, here and in child processes."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line a request
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    server = S3Server(Proxy(moto.get_host_and_port()))
    with changed_environment(server.environment):
        try:
            yield server
        finally:
            server.cut()
            moto.stop()


@contextlib.contextmanager
def changed_environment(values: dict[str, str | None]) -> Iterator[None]:
    """Set variables (None: remove them) and read fsspec's configuration again, for a while."""
    before = {name: os.environ.get(name) for name in values}
    kept = {protocol: dict(options) for protocol, options in conf.items()}
    _set(values)
    conf.pop("s3", None)
    set_conf_env(conf)
    _forget_connections()
    try:
        yield
    finally:
        _set(before)
        conf.clear()
        conf.update(kept)
        _forget_connections()


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _forget_connections() -> None:
    fsspec.get_filesystem_class("s3").clear_instance_cache()
