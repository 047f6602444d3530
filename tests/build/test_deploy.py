"""Linters and parsers over what users deploy with."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefill_service.cli.config_loading import resolve_config

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def lint(*command: str, cwd: Path = ROOT) -> str:
    """What a linter complains of."""
    result = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=cwd, capture_output=True)
    output = (result.stdout + result.stderr).decode()
    assert (result.returncode == 0) == (output == ""), output
    return output


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def test_protos_are_lint_free() -> None:
    assert lint("buf", "lint", cwd=ROOT / "protos") == ""


def test_dockerfile_is_lint_free(tmp_path: Path) -> None:
    assert lint("hadolint", "Dockerfile") == ""
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN apt-get install vim\n")
    assert "DL3006" in lint("hadolint", "Dockerfile", cwd=tmp_path)


def test_dockerfile_copies_only_what_the_context_has() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    kept = {line[1:] for line in ignored if line.startswith("!")}
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from=" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line
                assert any(source == k or source.startswith(f"{k}/") for k in kept), line


def test_manifests_fit_together() -> None:
    objects = {
        (document["kind"], document["metadata"]["name"]): document
        for path in MANIFESTS
        if path.name != "kustomization.yaml"
        for document in documents(path)
    }
    [kustomization] = documents(DEPLOY / "kubernetes" / "kustomization.yaml")
    assert {*kustomization["resources"], "kustomization.yaml"} == {p.name for p in MANIFESTS}
    pod = objects["Deployment", "prefill-service"]["spec"]["template"]
    [container] = pod["spec"]["containers"]
    service = objects["Service", "prefill-service"]["spec"]
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            assert ("PersistentVolumeClaim", claim) in objects
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in objects
    assert pod["spec"]["securityContext"]["runAsUser"] == 10001
    probes = [container[f"{kind}Probe"]["grpc"] for kind in ("startup", "readiness", "liveness")]
    ports = {probe["port"] for probe in probes}
    assert ports == {container["ports"][0]["containerPort"]}


def test_deployed_configuration_is_accepted() -> None:
    config = resolve_config(DEPLOY / "config.toml", {}).config
    assert config.server.host == "0.0.0.0"
    [configmap] = documents(DEPLOY / "kubernetes" / "configmap.yaml")
    assert configmap["data"]["config.toml"] == (DEPLOY / "config.toml").read_text()
    grace = documents(DEPLOY / "kubernetes" / "deployment.yaml")[0]["spec"]["template"]["spec"]
    assert grace["terminationGracePeriodSeconds"] > config.server.drain_seconds


def test_compose_names_targets_and_files_that_exist() -> None:
    [compose] = documents(DEPLOY / "compose.yaml")
    targets = set(re.findall(r"^FROM .* AS (\S+)", (ROOT / "Dockerfile").read_text(), re.M))
    for service in compose["services"].values():
        assert service["build"]["target"] in targets
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            exists = (
                (DEPLOY / source).exists() if source[0] == "." else source in compose["volumes"]
            )
            assert exists, volume


@pytest.mark.parametrize(
    "path",
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        DEPLOY / "README.md",
        ROOT / "clients" / "python" / "README.md",
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_readme_commands_exist(path: Path) -> None:
    text = path.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"(?:^\s*|`|\$ )make ([a-z]+)\b", text, re.M):
        assert target in targets, f"{path.name} says make {target}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"\.\[([a-z]+)\]", text):
        assert extra in extras["optional-dependencies"], f"{path.name} installs .[{extra}]"
    for name in re.findall(r"(?:tools|deploy|docs|benchmarks)/[\w./-]*\w", text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().rstrip().endswith("exec make test")


def test_tools_run_before_anything_is_installed() -> None:
    """setup_env.py may import the standard library only."""
    tree = ast.parse((ROOT / "tools" / "setup_env.py").read_text())
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert modules <= sys.stdlib_module_names
