"""What the doctor finds on Kubernetes: rules on its objects, and whole runs against a stand-in for its API server."""

from __future__ import annotations

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from launch import doctor
from launch.cluster import KubernetesCluster, Volume
from launch.doctor_kubernetes import NAMES_ONLY, TRAINER, claimed, enough, unsuited

SITE = {
    "backend": "kubernetes",
    "namespace": "vision",
    "container": "registry.example.com/clip:1",
    "gpus_per_node": 8,
    "cpus_per_process": 12,
    "memory_gb": 512,
    "time": "1:00:00",
    "volumes": [{"claim": "scratch", "path": "/scratch"}],
    "secrets": {"WANDB_API_KEY": "wandb/api-key"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
}


def site(**values):
    return KubernetesCluster.model_validate(SITE | values)


def node(name="a", **changes):
    """A node with eight GPUs that only GPU jobs may use; changes are of labels, spec, or allocatable."""
    allocatable = {"cpu": "95850m", "memory": "600Gi", "nvidia.com/gpu": "8"} | changes.get("allocatable", {})
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    return {
        "metadata": {"name": name, "labels": changes.get("labels", {})},
        "spec": {"taints": [taint]} | changes.get("spec", {}),
        "status": {
            "allocatable": allocatable,
            "conditions": [{"type": "Ready", "status": changes.get("ready", "True")}],
        },
    }


@pytest.mark.parametrize(
    ("machine", "values", "said"),
    [
        (node(), {"cpus_per_process": 11}, ""),
        (node(), {}, "has 95850m cpu, not 96"),
        (node(allocatable={"cpu": "96"}), {}, ""),
        (node(), {"memory_gb": 601, "cpus_per_process": 1}, "has 600Gi memory, not 601Gi"),
        (node(allocatable={"nvidia.com/gpu": "4"}), {"cpus_per_process": 1}, "has 4 nvidia.com/gpu, not 8"),
        (node(), {"cpus_per_process": 1, "resources": {"x/efa": "4"}}, "has no x/efa, not 4"),
        (node(ready="Unknown"), {}, "is not ready"),
        (node(spec={"unschedulable": True}), {}, "cordoned"),
        (node(labels={"zone": "b"}), {"node_selector": {"zone": "a"}}, "has zone=b, not a"),
        (node(), {"tolerations": []}, "taint nvidia.com/gpu=present:NoSchedule"),
        (node(), {"cpus_per_process": 1, "tolerations": [{"operator": "Exists"}]}, ""),
        (node(), {"tolerations": [{"key": "nvidia.com/gpu", "value": "other"}]}, "which is not tolerated"),
        (node(), {"cpus_per_process": 1, "tolerations": [{"key": "nvidia.com/gpu", "value": "present"}]}, ""),
        (node(), {"tolerations": [{"operator": "Exists", "effect": "NoExecute"}]}, "which is not tolerated"),
        (node(spec={"taints": [{"key": "x", "effect": "PreferNoSchedule"}]}), {"cpus_per_process": 1}, ""),
    ],
)
def test_a_node_must_suit_a_pod(machine, values, said):
    found = unsuited(machine, site(**values))
    assert said in found
    assert bool(said) == bool(found)


def test_too_few_nodes_are_a_warning_since_a_site_may_add_some():
    found = enough([node("a"), node("b", ready="False")], site(cpus_per_process=1), nodes=2)
    assert (found.state, found.found) == ("warning", "1 of 2 suit (b is not ready); 2 are wanted")


@pytest.mark.parametrize(
    ("phase", "modes", "read_only", "nodes", "state"),
    [
        ("Bound", ["ReadWriteMany"], False, 2, "ok"),
        ("Bound", ["ReadWriteOnce"], False, 1, "ok"),
        ("Bound", ["ReadWriteOnce"], False, 2, "fail"),
        ("Bound", ["ReadOnlyMany"], False, 2, "fail"),
        ("Bound", ["ReadOnlyMany"], True, 2, "ok"),
        ("Pending", ["ReadWriteMany"], False, 2, "warning"),
        ("Lost", ["ReadWriteMany"], False, 2, "fail"),
    ],
)
def test_a_claim_must_serve_all_nodes_at_once(phase, modes, read_only, nodes, state):
    volume = Volume(claim="scratch", path="/scratch", read_only=read_only)
    assert claimed(volume, {"spec": {"accessModes": modes}, "status": {"phase": phase}}, nodes).state == state


def listed(*names):
    return {"items": [{"metadata": {"name": name}} for name in names]}


NAMESPACE = "/api/v1/namespaces/vision"
SOUND = {
    "/version": {"gitVersion": "v1.37.0"},
    "/api/v1/namespaces": listed("default", "vision"),
    NAMESPACE: {"metadata": {"name": "vision"}},
    TRAINER: {"resources": [{"name": "trainjobs"}, {"name": "clustertrainingruntimes"}]},
    f"{TRAINER}/clustertrainingruntimes": listed("torch-distributed"),
    f"{TRAINER}/clustertrainingruntimes/torch-distributed": {"metadata": {}},
    f"{NAMESPACE}/persistentvolumeclaims": listed("scratch", "home"),
    f"{NAMESPACE}/persistentvolumeclaims/scratch": {
        "spec": {"accessModes": ["ReadWriteMany"]},
        "status": {"phase": "Bound"},
    },
    f"{NAMESPACE}/secrets/wandb": {"metadata": {"name": "wandb"}},
    "/api/v1/nodes": {"items": [node("a", allocatable={"cpu": "96"}), node("b", allocatable={"cpu": "96"})]},
}


class Server(ThreadingHTTPServer):
    """Answers GET from a table of paths: None is forbidden; takes every POST, and remembers where it went."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.table, self.asked = copy.deepcopy(SOUND), []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append((path, self.headers["Accept"], self.headers["Authorization"]))
        found = self.server.table.get(path, 404)
        self._answer(403 if found is None else 404 if found == 404 else 200, found)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, "POST", ""))
        self._answer(201, {})

    def _answer(self, status, body):
        text = json.dumps(body if status < 400 else {"message": f"no: {status}"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def examine(server, tmp_path, monkeypatch):
    """examine(key=value of the cluster file…) → the findings by check, each as text."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))

    def run(**values):
        names = {"name": "here", "context": {"cluster": "here", "user": "me"}}
        address = f"http://127.0.0.1:{server.server_port}"
        settings = {
            "clusters": [{"name": "here", "cluster": {"server": address}}],
            "users": [{"name": "me", "user": {"token": "a-token"}}],
            "contexts": [names],
            "current-context": "here",
        }
        (tmp_path / "config").write_text(yaml.safe_dump(settings))
        found = doctor.doctor(site(**values), Path("/scratch/runs"), nodes=2, wait_s=1)
        return {one.check: f"{one.state} | {one.found} | {one.fix}" for one in found}

    return run


def test_a_sound_cluster(server, examine):
    """The token goes along, no secret is fetched, and what is made is made for a trial only."""
    checks = ("python", "packages", "API", "namespace", "Trainer", "volumes", "secrets", "nodes", "job")
    assert {check: row.split(" ")[0] for check, row in examine().items()} == dict.fromkeys(checks, "ok")
    assert {token for _, how, token in server.asked if how != "POST"} == {"Bearer a-token"}
    assert [how for path, how, _ in server.asked if "/secrets/" in path] == [NAMES_ONLY]
    posted = [path for path, how, _ in server.asked if how == "POST"]
    assert posted
    assert all("dryRun=All" in path for path in posted)


@pytest.mark.parametrize(
    ("gone", "values", "check", "said"),
    [
        ([NAMESPACE], {}, "namespace", "'vision' is not there"),
        ([], {"namespace": "visoin", "secrets": {}, "volumes": []}, "namespace", "did you mean vision?"),
        ([TRAINER], {}, "Trainer", "is not installed | install Kubeflow Trainer"),
        ([], {"runtime": "torch-distribted"}, "Trainer", "did you mean torch-distributed?"),
        ([f"{NAMESPACE}/persistentvolumeclaims/scratch"], {}, "volumes", "no PersistentVolumeClaim 'scratch'"),
        ([f"{NAMESPACE}/secrets/wandb"], {}, "secrets", "there is no Secret 'wandb'"),
        ([], {"container": ""}, "job", "names no image"),
    ],
)
def test_what_is_not_there_is_named_with_the_fix(server, examine, gone, values, check, said):
    for path in gone:
        del server.table[path]
    rows = examine(**values)
    assert rows[check].startswith("fail")
    assert said in rows[check]


def test_what_may_not_be_looked_at_is_a_warning(server, examine):
    server.table |= {"/api/v1/nodes": None, f"{NAMESPACE}/secrets/wandb": None}
    rows = examine()
    assert rows["nodes"].startswith("warning")
    assert rows["secrets"].startswith("warning")


def test_a_server_that_does_not_answer(server, examine):
    server.shutdown()
    server.server_close()
    rows = examine()
    assert rows["API"].startswith("fail")
    assert "does not answer" in rows["API"]
