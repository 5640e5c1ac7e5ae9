"""The configurations for agents parse, and mean the same socket, port and tags. No program that they are for is run."""

from __future__ import annotations

import configparser
import fnmatch
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from gevent import subprocess

from geventaudit import TCP, AuditType, Client, ConnectionFailedError, DomainSocket
from geventaudit.agent import Agent

yaml = pytest.importorskip("yaml", reason="needs pyyaml, which the extra [test] brings")

AGENTS = Path(__file__).parent.parent / "examples" / "agents"
SOCKET = "/run/audit/agent.sock"
FOLDER = os.path.dirname(SOCKET)
PORT = 24224
TAGS = {AuditType.DATA_PLANE, AuditType.CONTROL_PLANE, AuditType.HEARTBEAT}
MANIFESTS = sorted(path.name for path in (AGENTS / "kubernetes").iterdir())
UNITS = sorted(path.name for path in (AGENTS / "systemd").iterdir())


def load(name: str) -> Any:
    return yaml.safe_load((AGENTS / name).read_text())


def test_every_file_is_tested_and_listed() -> None:
    names = {str(path.relative_to(AGENTS)) for path in AGENTS.rglob("*") if path.is_file()} - {"README.md"}
    assert names == {
        *("fluent-bit.yaml", "fluentd.conf", "vector.yaml", "otel-collector.yaml"),
        *("kubernetes/sidecar.yaml", "kubernetes/daemonset.yaml"),
        *("systemd/audit-agent.service", "systemd/app.service"),
    }
    readme = (AGENTS / "README.md").read_text()
    assert set(re.findall(r"\]\(([\w/.-]+\.(?:yaml|conf|service))\)", readme)) == names


def check_fluent_bit(config: dict[str, Any]) -> None:
    inputs, outputs = config["pipeline"]["inputs"], config["pipeline"]["outputs"]
    assert {each["name"] for each in inputs} == {"forward"}
    assert inputs[0]["unix_path"] == SOCKET
    assert int(inputs[0]["unix_perm"], 8) == 0o660
    for each in inputs:  # acknowledged means on disk, and never paused
        assert each["storage.type"] == "filesystem"
        assert "mem_buf_limit" not in each
    assert config["service"]["storage.path"].startswith("/var/lib/")
    assert "storage.checksum" not in config["service"], "a kill would cost acknowledged chunks"
    for each in outputs:
        assert {tag for tag in TAGS if fnmatch.fnmatchcase(tag, each["match"])} == TAGS
        # out_s3 takes no_limits for 5.
        assert each["retry_limit"] == (1_000_000 if each["name"] == "s3" else "no_limits")


def test_fluent_bit() -> None:
    config = load("fluent-bit.yaml")
    check_fluent_bit(config)
    _, tcp = config["pipeline"]["inputs"]
    assert (tcp["port"], tcp["tls"]) == (PORT, True)
    assert [each["name"] for each in config["pipeline"]["outputs"]] == ["kafka", "s3", "forward"]
    assert config["pipeline"]["outputs"][2]["require_ack_response"] is True
    assert {each["match"] for each in config["pipeline"]["filters"]} == TAGS


def fluentd_sections(text: str) -> list[tuple[str, dict[str, Any]]]:
    """A tree of (head, body), body being parameters by name and nested sections under ``""``."""
    stack: list[tuple[str, dict[str, Any]]] = [("", {"": []})]
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if closing := re.fullmatch(r"</(\w+)>", line):
            head, body = stack.pop()
            assert head.split()[0] == closing[1], f"line {number} closes {closing[1]} in {head}"
            stack[-1][1][""].append((head, body))
        elif opening := re.fullmatch(r"<(\w+[^>]*)>", line):
            stack.append((opening[1], {"": []}))
        else:
            name, _, value = line.partition(" ")
            assert re.fullmatch(r"@?\w+", name), f"line {number}"
            assert value, f"line {number}"
            stack[-1][1][name] = value.strip()
    (root,) = stack
    return list(root[1][""])


def test_fluentd() -> None:
    unix, tcp, match = fluentd_sections((AGENTS / "fluentd.conf").read_text())
    assert (unix[0], unix[1]["@type"], unix[1]["path"]) == ("source", "unix", SOCKET)
    assert (tcp[0], tcp[1]["@type"], int(tcp[1]["port"])) == ("source", "forward", PORT)
    assert set(match[0].split()[1:]) == TAGS
    stores = [body for _, body in match[1][""]]
    assert [store["@type"] for store in stores] == ["kafka2", "s3", "forward"]
    paths = set()
    for store in stores:
        (buffer,) = [body for head, body in store[""] if head.split()[0] == "buffer"]
        assert (buffer["@type"], buffer["overflow_action"], buffer["retry_forever"]) == ("file", "block", "true")
        paths.add(buffer["path"])
    assert len(paths) == 3, "each buffer has a folder of its own"
    assert stores[2]["require_ack_response"] == "true"


def test_vector() -> None:
    config = load("vector.yaml")
    sources, sinks = config["sources"], config["sinks"]
    assert {source["type"] for source in sources.values()} == {"fluent"}
    assert (sources["audit_unix"]["path"], sources["audit_unix"]["socket_file_mode"]) == (SOCKET, 0o660)
    assert sources["audit_tcp"]["address"] == f"0.0.0.0:{PORT}"
    assert {sink["type"] for sink in sinks.values()} == {"kafka", "aws_s3", "vector"}
    waiting = DomainSocket.__init__.__kwdefaults__["ack_timeout"]
    for sink in sinks.values():
        assert set(sink["inputs"]) == set(sources)
        assert sink["acknowledgements"]["enabled"] is True
        assert sink.get("batch", {}).get("timeout_secs", 1) < waiting / 2, "the clients would give up first"


def test_otel_collector() -> None:
    config = load("otel-collector.yaml")
    assert config["receivers"]["fluentforward"]["endpoint"] == f"unix://{SOCKET}"
    (pipeline,) = config["service"]["pipelines"].values()
    assert set(pipeline["receivers"]) == set(config["receivers"])
    assert set(pipeline["exporters"]) == set(config["exporters"]) == {"kafka", "awss3", "otlp"}
    assert set(config["service"]["extensions"]) == set(config["extensions"])
    for exporter in config["exporters"].values():
        assert exporter["retry_on_failure"]["max_elapsed_time"] == 0
        assert exporter["sending_queue"]["storage"] in config["extensions"]
        assert exporter["sending_queue"]["block_on_overflow"] is True


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes(name: str) -> None:
    documents = list(yaml.safe_load_all((AGENTS / "kubernetes" / name).read_text()))
    (agent,) = [each["data"]["fluent-bit.yaml"] for each in documents if each["kind"] == "ConfigMap"]
    check_fluent_bit(yaml.safe_load(agent))
    senders = 0
    for document in documents:
        if document["kind"] not in ("Deployment", "DaemonSet"):
            continue
        pod = document["spec"]["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            assert mounts["audit-socket"]["mountPath"] == FOLDER, "the folder, not the file"
            assert container["securityContext"]["runAsGroup"] == 2000
            for mount in mounts.values():
                assert mount["name"] in volumes
                assert "subPath" not in mount, "a file that is mounted itself stays the old one"
            senders += {"name": "AUDIT_SOCKET", "value": SOCKET} in container.get("env", [])
        for volume in volumes.values():
            if "hostPath" in volume:
                assert volume["hostPath"]["type"] == "DirectoryOrCreate"
                assert not volume["hostPath"]["path"].endswith(".sock")
    assert senders == 1


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_by_its_own_schemas(name: str) -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="needs kubernetes-validate, which the extra [dev] brings (22 MB)"
    )
    for document in yaml.safe_load_all((AGENTS / "kubernetes" / name).read_text()):
        validate.validate(document, validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", UNITS)
def test_systemd(name: str) -> None:
    unit = configparser.RawConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((AGENTS / "systemd" / name).read_text())
    assert unit["Service"]["ExecStart"].startswith("/")
    if name == "audit-agent.service":
        assert f"/run/{unit['Service']['RuntimeDirectory']}" == FOLDER
        assert unit["Service"]["RuntimeDirectoryPreserve"] == "restart"
        assert unit["Service"]["ExecStart"].endswith("fluent-bit.yaml")
    else:
        assert unit["Service"]["Environment"] == f"AUDIT_SOCKET={SOCKET}"
        assert unit["Service"]["SupplementaryGroups"] == "audit"
        config = (AGENTS.parent / "gunicorn.conf.py").read_text()
        (graceful,) = re.findall(r"^graceful_timeout = (\d+)", config, re.MULTILINE)
        assert int(unit["Service"]["TimeoutStopSec"]) > int(graceful)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_by_its_own_word(folder: Path) -> None:
    """With programs that are here in the place of those that are not."""
    paths = [folder / name for name in UNITS]
    for path in paths:
        text = (AGENTS / "systemd" / path.name).read_text()
        path.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={shutil.which('true')}", text, flags=re.MULTILINE))
    process = subprocess.Popen(
        ["systemd-analyze", "verify", *map(str, paths)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with process:
        output = process.communicate(timeout=60)[0]
    assert (process.returncode, output) == (0, b"")


def test_a_mounted_file_stays_the_old_socket(folder: Path) -> None:
    """The reason to mount the folder. A hard link is like a mounted file: another name for the same inode."""
    (folder / "audit").mkdir()
    socket, mounted = folder / "audit" / "agent.sock", folder / "mounted.sock"
    with Agent(socket, lambda received: None) as agent:
        os.link(socket, mounted)
        DomainSocket(mounted).close()
        agent.restart()
        DomainSocket(socket).close()
        with pytest.raises(ConnectionFailedError, match="refused"):
            DomainSocket(mounted)


def test_the_arguments_in_the_readme_exist() -> None:
    """The keyword arguments in its table exist."""
    readme = (AGENTS / "README.md").read_text()
    for kind, arguments in re.findall(r"`(DomainSocket|TCP)\((.*?)\)`", readme):
        for name in re.findall(r"(\w+)=", arguments):
            assert name in {"DomainSocket": DomainSocket, "TCP": TCP}[kind].__init__.__kwdefaults__
    assert "datetimes" in Client.__init__.__kwdefaults__
