"""Compose files and Kubernetes manifests against their published schemas, and the essentials by hand."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_stack import ROOT, compose_command, run

TOOLS = ROOT / os.environ.get("TOSCA_DOCKER_TOOLS", ".tosca/docker-tools/bin")
OVERLAYS = ("base", "overlays/s3", "overlays/gpu", "overlays/monitoring")
SETTINGS_PREFIX = "TOSCA_"


def tool(name: str) -> str:
    path = TOOLS / name
    if not path.is_file():
        pytest.skip(f"{name} is not installed; `make test-docker` installs it into {TOOLS}")
    return str(path)


@pytest.mark.parametrize("file", ["compose.yaml", "docker/compose.yaml"])
def test_compose_files_fit_the_specification(file: str) -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file)


def test_compose_at_hand_accepts_the_file() -> None:
    command = compose_command()
    if command is None:
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    for profile in ("gpu", "train", "s3", "monitoring"):
        run(*command, "--profile", profile, "config", "--quiet")


def test_every_compose_service_is_hardened_and_published_on_loopback_only() -> None:
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["logging"]["options"]["max-size"], name
        assert service["mem_limit"], name
        for port in service.get("ports", []):
            assert port.startswith("${TOSCA_BIND:-127.0.0.1}:"), name


def test_compose_passes_only_settings_that_exist() -> None:
    from service.settings import Settings

    named = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["x-settings"]
    known = {f"{SETTINGS_PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert set(named) <= known, set(named) - known


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Any]]:
    """One rendered overlay: the file and its documents."""
    folder = f"deploy/kubernetes/{request.param}"
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", folder]
    elif shutil.which("kustomize"):
        command = ["kustomize", "build", folder]
    else:
        pytest.skip("neither kubectl nor kustomize is installed")
    rendered = tmp_path_factory.mktemp("rendered") / "manifests.yaml"
    rendered.write_text(run(*command).stdout)
    return rendered, list(yaml.safe_load_all(rendered.read_text()))


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_manifests_fit_kubernetes(manifests: tuple[Path, list[Any]], version: str) -> None:
    own = manifests[0].with_name(
        "kubernetes.yaml"
    )  # Kubernetes has no schema for the Prometheus Operator's kind
    own.write_text(yaml.safe_dump_all(one for one in manifests[1] if one["kind"] != "ServiceMonitor"))
    run(tool("kubernetes-validate"), "--strict", "--no-warn", "-k", version, str(own))


def test_every_pod_is_restricted(manifests: tuple[Path, list[Any]]) -> None:
    """What the restricted Pod Security Standard asks for, and a read-only root besides."""
    pods = [one["spec"]["template"]["spec"] for one in manifests[1] if one["kind"] in ("Deployment", "Job")]
    assert len(pods) == 2
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


def test_the_deployment_stops_slower_than_it_drains(manifests: tuple[Path, list[Any]]) -> None:
    by_kind = {one["kind"]: one for one in manifests[1]}
    deployment = by_kind["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
    assert "preStop" in container["lifecycle"]
    drain_s = float(by_kind["ConfigMap"]["data"]["TOSCA_SHUTDOWN_TIMEOUT_S"])
    assert pod["terminationGracePeriodSeconds"] > drain_s + 8
    assert "replicas" not in deployment  # the autoscaler owns it


def test_selectors_meet_the_pods(manifests: tuple[Path, list[Any]]) -> None:
    by_kind = {one["kind"]: one for one in manifests[1]}
    labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert by_kind["Service"]["spec"]["selector"].items() <= labels
    for kind in ("PodDisruptionBudget", "Deployment"):
        assert by_kind[kind]["spec"]["selector"]["matchLabels"].items() <= labels
    assert by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels
    assert by_kind["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "tosca"


def test_the_monitoring_overlay_watches_the_service_and_scales_by_a_metric_that_exists() -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    rendered = run("kubectl", "kustomize", "deploy/kubernetes/overlays/monitoring").stdout
    by_kind = {one["kind"]: one for one in yaml.safe_load_all(rendered)}
    service, monitor = by_kind["Service"], by_kind["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {one["port"] for one in monitor["endpoints"]} <= {one["name"] for one in service["spec"]["ports"]}
    (metric,) = (
        one["pods"]["metric"]["name"]
        for one in by_kind["HorizontalPodAutoscaler"]["spec"]["metrics"]
        if one["type"] == "Pods"
    )
    # tests/test_metrics.py holds the document to what is exported.
    assert f"| `{metric}` | gauge |" in (ROOT / "docs/monitoring.md").read_text()
    adapter = yaml.safe_load((ROOT / "deploy/kubernetes/prometheus-adapter-values.yaml").read_text())
    assert [one["seriesQuery"].partition("{")[0] for one in adapter["rules"]["custom"]] == [metric]


def test_the_s3_overlay_has_no_volume_claim() -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    rendered = run("kubectl", "kustomize", "deploy/kubernetes/overlays/s3").stdout
    assert "PersistentVolumeClaim" not in rendered
    assert "persistentVolumeClaim" not in rendered
