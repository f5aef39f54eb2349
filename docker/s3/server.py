"""Serve S3 from memory on port 9000, with one empty bucket `tosca`, until SIGTERM."""

import signal
import threading
import urllib.request

from moto.server import ThreadedMotoServer


def main() -> None:
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    server = ThreadedMotoServer("0.0.0.0", 9000)  # noqa: S104
    server.start()
    bucket = urllib.request.Request("http://127.0.0.1:9000/tosca", method="PUT")
    urllib.request.urlopen(bucket, timeout=10).close()  # noqa: S310
    stopped.wait()
    server.stop()


if __name__ == "__main__":
    main()
