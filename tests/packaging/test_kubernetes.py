"""The Kubernetes manifests: valid by Kubernetes' schemas, and their numbers fit the configuration in them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml

from expressgateway.config.load import load
from expressgateway.config.schema import Config
from expressgateway.demo.certificate import make_certificate, write_certificate
from tests.test_repository import ROOT, project

MANIFESTS = ROOT / "ops" / "kubernetes"
OLDEST = "1.29"
MARGIN_S = 10

FILES = sorted(MANIFESTS.glob("*.yaml"))


def manifest(name: str) -> Any:
    """The one document of a file."""
    return yaml.safe_load((MANIFESTS / f"{name}.yaml").read_text())


@pytest.fixture(scope="module")
def pod() -> Any:
    return manifest("deployment")["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: Any) -> Any:
    (only,) = pod["containers"]
    return only


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the container finds in /etc/expressgateway: the ConfigMap's file, and a certificate."""
    place = tmp_path_factory.mktemp("etc")
    (place / "gateway.toml").write_text(manifest("configmap")["data"]["gateway.toml"])
    (place / "tls").mkdir()
    made = write_certificate(place / "tls", make_certificate("localhost"), "tls")
    made.certificate.rename(place / "tls" / "tls.crt")
    made.key.rename(place / "tls" / "tls.key")
    (place / "tls" / "tls.key").chmod(0o440)
    return place


@pytest.fixture(scope="module")
def config(mounted: Path) -> Config:
    return load(mounted / "gateway.toml", insecure_key_permissions=True).config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("version", [OLDEST, str(kubernetes_validate.latest_version())])
def test_a_manifest_is_valid(path: Path, version: str) -> None:
    kubernetes_validate.validate(yaml.safe_load(path.read_text()), version, strict=True)


def test_a_mistake_in_a_manifest_would_be_seen() -> None:
    wrong = manifest("deployment")
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, OLDEST, strict=True)


def test_the_configuration_checks_as_the_container_is_started(container: Any, mounted: Path) -> None:
    run, *options, path = container["args"]
    assert run == "run"
    command = [sys.executable, "-m", "expressgateway", "check", *options, mounted / Path(path).name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_grace_period_is_longer_than_the_drain(pod: Any, config: Config) -> None:
    longest_ms = max(listener.drain_timeout_ms or 0 for listener in config.listeners)
    longest_ms = max(longest_ms, config.runtime.drain_timeout_ms) + config.runtime.readiness_settle_ms
    assert pod["terminationGracePeriodSeconds"] >= longest_ms / 1000 + MARGIN_S


def test_unreadiness_is_seen_before_the_gateway_stops_accepting(container: Any, config: Config) -> None:
    probe = container["readinessProbe"]
    seen_s = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert seen_s * 1000 < config.runtime.readiness_settle_ms


def test_ports_and_probes_are_those_of_the_listeners(container: Any, config: Config) -> None:
    admin = config.observability.metrics_bind
    assert admin is not None
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert set(ports.values()) == {*(listener.address.port for listener in config.listeners), admin.port}
    assert ports["admin"] == admin.port
    assert not admin.is_loopback  # the kubelet asks from outside the pod
    probed = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    paths = {"startup": "/startupz", "liveness": "/livez", "readiness": "/readyz"}
    assert probed == {name: {"path": path, "port": "admin"} for name, path in paths.items()}
    offered = {port["targetPort"] for port in manifest("service")["spec"]["ports"]}
    assert offered == set(ports) - {"admin"}


def test_the_pod_has_no_rights(pod: Any, container: Any) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    user = f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert user in (ROOT / "ops" / "oci" / "Containerfile").read_text().splitlines()


def test_there_is_a_worker_for_each_core(container: Any, config: Config) -> None:
    assert str(config.runtime.workers) == container["resources"]["requests"]["cpu"]


def test_the_image_is_of_this_version(container: Any) -> None:
    assert container["image"] == f"expressgateway:{project()['version']}"


def test_everything_selects_the_pods() -> None:
    labels = manifest("deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("service")["spec"]["selector"] == labels
    for name in ("deployment", "disruption-budget", "optional/pod-monitor"):
        assert manifest(name)["spec"]["selector"] == {"matchLabels": labels}
    target = manifest("autoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifest("deployment")["metadata"]["name"])


def test_what_is_mounted_is_there() -> None:
    volumes = manifest("deployment")["spec"]["template"]["spec"]["volumes"]
    assert {
        "configMap": {"name": manifest("configmap")["metadata"]["name"]},
        "name": "configuration",
    } in volumes
