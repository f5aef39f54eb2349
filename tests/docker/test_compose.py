"""docker compose up, for real: one stack, taken through its life in the order of this file."""

import http.client
import io
import json
import random
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from compose_stack import PROMETHEUS_IMAGE, SERVICE_IMAGE, TRAINER_IMAGE, Stack, builder_env, run
from PIL import Image, ImageDraw

MAX_SERVICE_BYTES = 1_600_000_000
MAX_READY_S = 40.0
SHAPES = ("circle", "square", "triangle")


def draw_shape(shape: str, seed: int) -> bytes:
    """A filled shape of random colour, size and place, as PNG."""
    rng = random.Random(f"{shape} {seed}")
    picture = Image.new("RGB", (160, 160), tuple(rng.randrange(200, 256) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    side, x, y = rng.randrange(60, 110), rng.randrange(0, 50), rng.randrange(0, 50)
    colour = tuple(rng.randrange(0, 150) for _ in range(3))
    box = (x, y, x + side, y + side)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y + side), (x + side, y + side), (x + side / 2, y)], fill=colour)
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def demo_picture(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real test picture that the init container wrote into the volume."""
    folder = tmp_path_factory.mktemp("demo")
    run("docker", "cp", f"{stack.container()}:/data/demo/textiles/test/global", str(folder))
    return min((folder / "global").iterdir()).read_bytes()


def test_the_service_image_is_small_and_lean(stack: Stack) -> None:
    for image in (SERVICE_IMAGE, TRAINER_IMAGE):
        size = int(run("docker", "image", "inspect", "--format", "{{.Size}}", image).stdout)
        stack.note(f"{image}: {size / 1e9:.3f} GB")
        if image == SERVICE_IMAGE:
            assert size <= MAX_SERVICE_BYTES
    script = (
        "import importlib.util as u, shutil, sys; "
        "print([n for n in ('pip', 'matplotlib', 'pyarrow', 'sklearn') if u.find_spec(n) "
        "and '.venv' in (u.find_spec(n).origin or '')], [n for n in ('gcc', 'cc', 'g++', 'make') if shutil.which(n)])"
    )
    found = run("docker", "run", "--rm", "--entrypoint", "python", SERVICE_IMAGE, "-c", script).stdout
    assert found.strip() == "[] []"


def test_what_was_pruned_is_missed_by_nothing(stack: Stack) -> None:
    """Runtimes, gRPC, traces and metrics load in the image that has none of what prune.py takes away."""
    script = (
        "import onnxruntime, openvino, torch, grpc, prometheus_client, opentelemetry.sdk.trace; "
        "import opentelemetry.exporter.otlp.proto.http.trace_exporter, service.open_inference.inference_pb2; "
        "print(torch.ones(2, 3).matmul(torch.ones(3)).tolist(), onnxruntime.get_available_providers()[-1], "
        "'CPU' in openvino.Core().available_devices)"
    )
    ran = run("docker", "run", "--rm", "--entrypoint", "python", SERVICE_IMAGE, "-c", script)
    assert ran.stdout.strip() == "[3.0, 3.0] CPUExecutionProvider True", ran.stderr


def test_up_gets_healthy_from_nothing(stack: Stack) -> None:
    started = time.monotonic()
    stack.compose("up", "-d", timeout_s=600)
    ready = stack.wait_ready()
    stack.note(
        f"first start, with backbone and demo tasks made: ready after {time.monotonic() - started:.1f} s"
    )
    stack.wait_healthy()
    assert ready["num_tasks"] == 2


def test_it_runs_unprivileged_on_a_read_only_root(stack: Stack) -> None:
    assert stack.inspect("{{.Config.User}} {{.HostConfig.ReadonlyRootfs}}") == "10001:10001 true"
    status = run("docker", "exec", stack.container(), "cat", "/proc/1/status").stdout
    assert "CapEff:\t0000000000000000" in status
    touched = run("docker", "exec", stack.container(), "touch", "/app/x", check=False)
    assert touched.returncode != 0
    assert stack.inspect('{{(index (index .HostConfig.PortBindings "8000/tcp") 0).HostIp}}') == "127.0.0.1"


def test_it_predicts_a_demo_picture(stack: Stack, demo_picture: bytes) -> None:
    answer = stack.predict(demo_picture)
    assert (answer["task"], answer["label"]) == ("textiles", "global")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/console/", b"<!doctype html"),
        ("/metrics", b"tosca_ready 1.0"),
        ("/v2/health/ready", b"ready"),
        ("/docs", b"swagger"),
    ],
)
def test_what_the_package_brings_along_is_in_the_image(stack: Stack, path: str, expected: bytes) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{stack.port}{path}", timeout=10) as response:
        assert expected in response.read()


def test_ready_soon_on_an_existing_volume(stack: Stack, demo_picture: bytes) -> None:
    before = stack.predict(demo_picture)
    stack.compose("down")
    started = time.monotonic()
    stack.compose("up", "-d")
    stack.wait_ready()
    seconds = time.monotonic() - started
    stack.note(f"`up` on an existing volume: ready after {seconds:.1f} s (limit {MAX_READY_S:.0f})")
    assert seconds <= MAX_READY_S
    assert stack.predict(demo_picture) == before


@pytest.fixture(scope="module")
def shapes_module(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The module file that the trainer container made from a mounted folder of pictures."""
    for shape in SHAPES:
        folder = stack.pictures / "shapes" / shape
        folder.mkdir(parents=True)
        for seed in range(12):
            (folder / f"{seed:02d}.png").write_bytes(draw_shape(shape, seed))
    started = time.monotonic()
    output = "/data/shapes.safetensors"
    stack.compose(
        "run", "--rm", "train", "--task", "shapes", "--data", "/pictures/shapes", "--output", output
    )
    stack.note(f"trained 'shapes' (36 pictures) in the trainer container: {time.monotonic() - started:.1f} s")
    target = tmp_path_factory.mktemp("module") / "shapes.safetensors"
    run("docker", "cp", f"{stack.container()}:{output}", str(target))
    return target.read_bytes()


def assert_knows_shapes(stack: Stack, *, port: int = 0) -> None:
    for shape in SHAPES:
        answer = stack.predict(draw_shape(shape, 99), port=port)
        assert (answer["task"], answer["label"]) == ("shapes", shape)


def test_a_task_trained_in_the_trainer_is_registered_and_answers(stack: Stack, shapes_module: bytes) -> None:
    status, answer = stack.request("POST", "/tasks", shapes_module)
    assert status in (200, 201), answer
    assert_knows_shapes(stack)


def test_training_publishes_and_the_service_follows(stack: Stack, shapes_module: bytes) -> None:
    assert stack.request("DELETE", "/tasks/shapes")[0] in (200, 204)
    stack.compose("run", "--rm", "train", "--task", "shapes", "--data", "/pictures/shapes")
    for _ in range(60):
        if stack.wait_ready()["num_tasks"] == 3:
            break
        time.sleep(0.5)
    assert_knows_shapes(stack)


def test_kill_loses_nothing_acknowledged(stack: Stack, shapes_module: bytes) -> None:
    """Every change is followed at once by SIGKILL; after the restart exactly the acknowledged state is there."""
    seconds = []
    for change in ("remove", "register", "remove", "register"):
        if change == "remove":
            status, answer = stack.request("DELETE", "/tasks/shapes")
        else:
            status, answer = stack.request("POST", "/tasks", shapes_module)
        run("docker", "kill", "-s", "KILL", stack.container())
        assert status in (200, 201), answer
        started = time.monotonic()
        stack.compose("up", "-d")
        ready = stack.wait_ready()
        seconds.append(time.monotonic() - started)
        assert ready["num_tasks"] == (2 if change == "remove" else 3)
    assert_knows_shapes(stack)
    stack.note(
        f"4 × SIGKILL right after an acknowledged change: nothing lost, ready again after "
        f"{min(seconds):.1f} to {max(seconds):.1f} s"
    )


class Load:
    """Clients that ask without pause, each request on a connection of its own, and remember what became of it."""

    def __init__(self, port: int, picture: bytes, num_clients: int) -> None:
        self.sent: list[tuple[float, float, str]] = []  # sent at, answered at, status or fault
        self._port, self._picture = port, picture
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(90)

    def _ask(self) -> None:
        for _ in range(100_000):
            if self._stopped.is_set():
                return
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
            sent_at = float("inf")
            try:
                connection.request("POST", "/predict", self._picture)
                sent_at = time.monotonic()
                response = connection.getresponse()
                response.read()
                outcome = str(response.status)
            except (OSError, http.client.HTTPException) as error:
                outcome = type(error).__name__
            finally:
                connection.close()
            self.sent.append((sent_at, time.monotonic(), outcome))
            if outcome != "200":
                time.sleep(0.02)


def drain(
    stack: Stack, picture: bytes, service: str, port: int, num_answered: int = 40
) -> tuple[Load, float]:
    """Load, `docker stop` amid it; the load and when the stop was asked for."""
    with Load(port, picture, num_clients=8) as load:
        for _ in range(1200):  # at most two minutes
            if len(load.sent) >= num_answered:
                break
            time.sleep(0.1)
        stopped_at = time.monotonic()
        run("docker", "stop", "-t", "45", stack.container(service))
        ended_at = time.monotonic()
    before = [one for one in load.sent if one[0] < stopped_at]
    in_flight = [one for one in before if one[1] >= stopped_at]
    later = [one for one in load.sent if stopped_at <= one[0] < float("inf")]
    failed = [one for one in before if one[2] != "200"]
    stack.note(
        f"docker stop under load ({service}): {len(before)} requests sent before, {len(in_flight)} of them in "
        f"flight, {len(failed)} failed; sent after it and answered: {sum(one[2] == '200' for one in later)}; "
        f"stopped in {ended_at - stopped_at:.1f} s"
    )
    assert len(before) >= num_answered
    assert in_flight, "the stop must hit requests in flight"
    assert not failed, failed[:5]
    return load, stopped_at


def test_stop_drains_under_load(stack: Stack, demo_picture: bytes) -> None:
    container = stack.container()
    drain(stack, demo_picture, "service", stack.port)
    code = run("docker", "inspect", "--format", "{{.State.ExitCode}}", container).stdout.strip()
    assert code in ("0", "143"), code  # 137 would be a kill after the grace period
    stack.compose("up", "-d")
    stack.wait_ready()


def test_prometheus_finds_the_service_and_reads_the_rules(stack: Stack) -> None:
    """Profile `monitoring` without Grafana, with Debian's Prometheus in the place of its makers' image."""
    run(
        "docker",
        "build",
        "--tag",
        PROMETHEUS_IMAGE,
        "tests/docker/prometheus",
        timeout_s=600,
        **builder_env(),
    )
    stack.compose("--profile", "monitoring", "up", "-d", "prometheus")
    stack.wait_ready()
    query = "/api/v1/query?query=tosca_tasks"
    for _ in range(120):  # at most a minute: the service is looked up and scraped every few seconds
        try:
            _, answer = stack.request("GET", query, port=stack.prometheus_port, timeout_s=5)
        except OSError:
            answer = None
        if answer and answer["data"]["result"]:
            break
        time.sleep(0.5)
    assert answer, stack.compose("logs", "--tail", "40", "prometheus")
    (series,) = answer["data"]["result"]
    assert (series["metric"]["job"], series["value"][1]) == ("tosca", str(stack.wait_ready()["num_tasks"]))
    _, rules = stack.request("GET", "/api/v1/rules", port=stack.prometheus_port)
    found = [rule for group in rules["data"]["groups"] for rule in group["rules"]]
    assert found and all(rule["health"] != "err" for rule in found), found
    stack.note(f"Prometheus scrapes the service; {len(found)} alert rules read")
    stack.compose("--profile", "monitoring", "stop", "prometheus")


def test_two_replicas_share_an_s3_store(stack: Stack, demo_picture: bytes, shapes_module: bytes) -> None:
    """One replica stops under load and the proxy's clients see no failed request, before or after."""
    stack.compose("stop", "service")
    services = ("s3", "s3-init", "replica-1", "replica-2", "proxy")
    stack.compose("--profile", "s3", "build", *services, timeout_s=900)
    started = time.monotonic()
    stack.compose("--profile", "s3", "up", "-d", "proxy", timeout_s=400)
    ready = stack.wait_ready(port=stack.proxy_port)
    stack.note(f"S3 server, two replicas, proxy: ready after {time.monotonic() - started:.1f} s")
    assert ready["num_tasks"] == 2
    status, answer = stack.request("POST", "/tasks", shapes_module, port=stack.proxy_port)
    assert status in (200, 201), answer
    time.sleep(7)  # the other replica follows within TOSCA_STORE_POLL_S
    for _ in range(4):
        assert_knows_shapes(stack, port=stack.proxy_port)
    load, _ = drain(stack, demo_picture, "replica-1", stack.proxy_port)
    faults = [one for one in load.sent if one[2] != "200"]
    stack.note(f"through the proxy: {len(load.sent)} requests, {len(faults)} failed")
    assert not faults, faults[:5]
    stack.compose("--profile", "s3", "stop")
    inspected = json.loads(run("docker", "inspect", stack_container(stack, "replica-2")).stdout)
    assert not any("example-not-a-secret" in one for one in inspected[0]["Config"]["Env"])


def stack_container(stack: Stack, service: str) -> str:
    """A stopped container's id, too."""
    label = f"label=com.docker.compose.service={service}"
    project = f"label=com.docker.compose.project={stack.project}"
    (name,) = run("docker", "ps", "-aq", "--filter", label, "--filter", project).stdout.split()
    return name


def test_nothing_of_the_build_context_is_secret(stack: Stack) -> None:
    """.dockerignore lets in only what the images are made of."""
    listed = Path(".dockerignore").read_text().splitlines()
    assert "*" in listed
    assert not any(one.startswith(("!.tosca", "!.git", "!tests", "!.venv")) for one in listed)
