"""Training and evaluating on Ray: the module files and figures of doing it here, from one feature extraction."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pictures import write_classes, write_splits
from ray_cluster import ray_environment
from synthetic import DEMO_PICTURES, DEMO_STORE

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def tosca(*arguments: object, status: int = 0) -> Any:
    command = [str(Path(sys.executable).with_name("tosca")), *map(str, arguments), "--json"]
    with ray_environment() as environment:
        done = subprocess.run(
            command,
            env={**environment, "TOSCA_STORE": str(Path(DEMO_STORE).absolute()), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300.0,
        )
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout)


def write_tasks(folder: Path) -> Path:
    """Two tasks of real pictures, and two that cannot be trained."""
    for task in ("digits", "textiles"):
        for label in sorted((DEMO_PICTURES / task / "train").iterdir())[:3]:
            for path in sorted(label.iterdir())[:8]:
                target = folder / task / label.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    damaged = write_classes(folder / "damaged", 2)
    for path in damaged.rglob("*.png"):
        path.write_bytes(b"no picture")
    write_splits(folder / "one-class" / "train" / "only")
    return folder


def test_module_files_trained_on_ray_are_those_trained_here_bit_for_bit(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    files: dict[str, dict[str, bytes]] = {}
    reports: dict[str, Any] = {}
    for where, flags in (("here", ()), ("ray", ("--ray",))):
        output = tmp_path / where
        reports[where] = tosca(
            *("train", "--many", tasks, "--output", output, "--cache", tmp_path / f"cache-{where}"),
            *("--report", tmp_path / "reports", *flags),
            status=1,  # two tasks fail, as they should
        )
        files[where] = {path.name: path.read_bytes() for path in output.glob("*.safetensors")}
    assert set(files["here"]) == {"digits.safetensors", "textiles.safetensors"}
    assert files["ray"] == files["here"]
    statuses = {
        where: {one["task"]: (one["status"], one.get("features_computed")) for one in report["tasks"]}
        for where, report in reports.items()
    }
    assert statuses["ray"] == statuses["here"]
    assert statuses["ray"]["damaged"][0] == "failed"


def test_figures_evaluated_on_ray_are_those_evaluated_here(tmp_path: Path) -> None:
    data = [f"--data={task}={DEMO_PICTURES / task}" for task in ("digits", "textiles")]
    assert tosca("evaluate", *data, "--ray", "--cache", tmp_path) == tosca("evaluate", *data)


def test_a_job_that_ends_its_process_is_run_once_more_and_takes_no_other_with_it(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    with ray_environment() as environment:
        done = subprocess.run(
            [sys.executable, tests / "ray_jobs.py", tmp_path],
            env={**environment, "PYTHONPATH": str(tests)},
            capture_output=True,
            text=True,
            timeout=200.0,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "fine": "fine",
        "wrong": "InvalidDataset: no such class",
        "dies": "BrokenProcessPool: training of dies ended its process",
        "dies-once": "dies-once",
    }
