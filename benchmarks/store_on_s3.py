"""The demo's store on an S3 server of its own: moto, in a process, in memory."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import obstore
from obstore.store import from_url

from benchmarks.changing_demo import DEMO

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import free_port

START_TIMEOUT_S = 60.0


@contextlib.contextmanager
def demo_on_s3(url: str, log: Path) -> Iterator[None]:
    """A copy of the demo's store at `url`, s3://BUCKET/…, until the block ends."""
    with s3_server(log) as endpoint:
        bucket = url.removeprefix("s3://").partition("/")[0]
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT"), timeout=30)
        copy_folder(DEMO / "store", url)
        yield


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """The endpoint of an S3 server in memory, which this process and those it starts use from now on."""
    port = free_port()
    command = [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    endpoint = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_REGION": "us-east-1",
    }
    try:
        ends_at = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(endpoint, timeout=5.0)
                break
            if process.poll() is not None or time.monotonic() > ends_at:
                raise RuntimeError(f"the S3 server does not start: {log.read_text()}")
            time.sleep(0.1)
        yield endpoint
    finally:
        process.terminate()
        process.wait(30.0)


def copy_folder(folder: Path, url: str) -> None:
    """Every file of a store in a folder, put under the same name into an object store."""
    target = from_url(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            obstore.put(target, str(path.relative_to(folder)), path.read_bytes(), use_multipart=False)
