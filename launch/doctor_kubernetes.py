"""Checks of a Kubernetes cluster: what the cluster file names must be there, and the server must accept such a job."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from launch import kubernetes, manifests
from launch.cluster import KubernetesCluster, Volume
from launch.doctor import Finding, failed
from launch.job import Job, LaunchError, Stage, Task

TRAINER = "/apis/trainer.kubeflow.org/v1alpha1"
# The answer is what a thing is called, not what it holds: values of secrets stay where they are.
NAMES_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
# Effects of taints that keep pods away.
KEEPS_AWAY = ("NoSchedule", "NoExecute")


class Site(kubernetes.Api):
    """The API server, of which anything can be asked."""

    def look(self, path: str, accept: str = "application/json") -> dict[str, Any]:
        """What is at a path of the server; nothing, where there is no such thing."""

        def get(_request_timeout: float) -> dict[str, Any]:
            client = self._core.api_client
            request = client.param_serialize(
                "GET", path, header_params={"Accept": accept}, auth_settings=["BearerToken"]
            )
            response = client.call_api(*request, _request_timeout=_request_timeout)
            response.read()
            client.response_deserialize(response, {"200": "bytearray"})  # raises what is no success
            return dict(json.loads(response.data))

        return dict(self._ask(f"look at {path}", get, instead=kubernetes.ABSENT))


def findings(cluster: KubernetesCluster, folder: Path, nodes: int) -> Iterator[Finding]:
    """What is found, one after the other; nothing is made there."""
    try:
        site = Site(cluster)
        version = site.look("/version")
    except LaunchError as error:
        yield failed("API", str(error))
        return
    yield Finding(
        "API", "ok", f"Kubernetes {version.get('gitVersion', '?')}, context {cluster.context or 'by default'}"
    )
    checks = {
        "namespace": _namespace(site, cluster),
        "Trainer": _trainer(site, cluster),
        "volumes": _volumes(site, cluster, nodes),
        "secrets": _secrets(site, cluster),
        "nodes": _nodes(site, cluster, nodes),
    }
    for name, check in checks.items():
        try:
            yield from check
        except LaunchError as error:
            # Users may run jobs in a namespace, and not look at all that is there.
            yield Finding(name, "warning", str(error).partition(" The fix: ")[0], "it may be right; ask who may look")
    yield _job(site, cluster, folder, nodes)


def _namespace(site: Site, cluster: KubernetesCluster) -> Iterator[Finding]:
    if site.look(f"/api/v1/namespaces/{cluster.namespace}"):
        yield Finding("namespace", "ok", cluster.namespace)
    else:
        near = _nearest(cluster.namespace, site.look("/api/v1/namespaces"))
        yield Finding("namespace", "fail", f"{cluster.namespace!r} is not there", f"`namespace`: {near}")


def _trainer(site: Site, cluster: KubernetesCluster) -> Iterator[Finding]:
    if cluster.kind != "trainjob":
        return
    kinds = {one["name"] for one in site.look(TRAINER).get("resources", [])}
    if "trainjobs" not in kinds:
        fix = "install Kubeflow Trainer 2.3 or newer, or say `kind: job` in the cluster file"
        yield Finding("Trainer", "fail", "Kubeflow Trainer (trainer.kubeflow.org/v1alpha1) is not installed", fix)
    elif site.look(f"{TRAINER}/clustertrainingruntimes/{cluster.runtime}"):
        yield Finding("Trainer", "ok", f"installed, with the runtime {cluster.runtime}")
    else:
        near = _nearest(cluster.runtime, site.look(f"{TRAINER}/clustertrainingruntimes"))
        yield Finding("Trainer", "fail", f"{cluster.runtime!r} is no ClusterTrainingRuntime", f"`runtime`: {near}")


def _volumes(site: Site, cluster: KubernetesCluster, nodes: int) -> Iterator[Finding]:
    path = f"/api/v1/namespaces/{cluster.namespace}/persistentvolumeclaims"
    for volume in cluster.volumes:
        claim = site.look(f"{path}/{volume.claim}")
        if not claim:
            near = _nearest(volume.claim, site.look(path))
            found = f"there is no PersistentVolumeClaim {volume.claim!r} for {volume.path}"
            yield Finding("volumes", "fail", found, f"`claim`: {near}")
        else:
            yield claimed(volume, claim, nodes)


def claimed(volume: Volume, claim: dict[str, Any], nodes: int) -> Finding:
    """Whether all pods of a job can use a PersistentVolumeClaim at once."""
    phase, modes = claim.get("status", {}).get("phase", "?"), claim["spec"].get("accessModes", [])
    found = f"{volume.claim} is {phase}, {', '.join(modes)}"
    shared = {"ReadWriteMany", *(["ReadOnlyMany"] if volume.read_only else [])}
    if phase == "Lost":
        return Finding("volumes", "fail", found, "its PersistentVolume is gone: ask the site")
    if nodes > 1 and not shared & set(modes):
        fix = f"a claim with {' or '.join(sorted(shared))}: {nodes} nodes must use {volume.path} at once"
        return Finding("volumes", "fail", found, fix)
    if phase != "Bound":
        return Finding("volumes", "warning", found, "it may be bound once a pod wants it: `kubectl describe pvc`")
    return Finding("volumes", "ok", found)


def _secrets(site: Site, cluster: KubernetesCluster) -> Iterator[Finding]:
    path = f"/api/v1/namespaces/{cluster.namespace}/secrets"
    for secret in sorted({entry.partition("/")[0] for entry in cluster.secrets.values()}):
        if site.look(f"{path}/{secret}", NAMES_ONLY):
            yield Finding("secrets", "ok", f"{secret} is there; what is in it was not looked at")
        else:
            yield Finding("secrets", "fail", f"there is no Secret {secret!r}", "make it, or mend `secrets`")


def _nodes(site: Site, cluster: KubernetesCluster, nodes: int) -> Iterator[Finding]:
    yield enough(site.look("/api/v1/nodes").get("items", []), cluster, nodes)


def enough(machines: list[dict[str, Any]], cluster: KubernetesCluster, nodes: int) -> Finding:
    """Whether as many nodes suit a job's pods as it is to have; whether they are free just now is not asked."""
    reasons = {one["metadata"]["name"]: unsuited(one, cluster) for one in machines}
    suited = [name for name, reason in reasons.items() if not reason]
    others = "; ".join(f"{name} {reason}" for name, reason in list(reasons.items())[:5] if reason)
    found = f"{len(suited)} of {len(machines)} suit" + (f" ({others})" if others else "")
    if len(suited) >= nodes:
        return Finding("nodes", "ok", found)
    fix = (
        "lower what the cluster file asks of a node (gpus_per_node, cpus_per_process, memory_gb), mend node_selector "
        "or tolerations, or take fewer --nodes; if the site adds nodes when they are wanted, all is well"
    )
    return Finding("nodes", "warning", f"{found}; {nodes} are wanted", fix)


def unsuited(machine: dict[str, Any], cluster: KubernetesCluster) -> str:
    """Why a node cannot take a pod of a job; "" where it can."""
    from kubernetes.utils import parse_quantity

    labels, spec = machine["metadata"].get("labels", {}), machine.get("spec", {})
    has = machine.get("status", {}).get("allocatable", {})
    conditions = machine.get("status", {}).get("conditions", [])
    wanted = {
        **cluster.resources,
        "cpu": str(cluster.cpus_per_process * cluster.processes),
        "memory": f"{cluster.memory_gb or 0}Gi",
        cluster.gpu_resource: str(cluster.gpus_per_node),
    }
    for condition in conditions:
        if condition["type"] == "Ready" and condition["status"] != "True":
            return "is not ready"
    if spec.get("unschedulable"):
        return "takes no pods (cordoned)"
    for key, value in cluster.node_selector.items():
        if labels.get(key) != value:
            return f"has {key}={labels.get(key)}, not {value}"
    for taint in spec.get("taints", []):
        if taint["effect"] in KEEPS_AWAY and not any(_tolerates(one, taint) for one in cluster.tolerations):
            return f"has the taint {taint['key']}={taint.get('value', '')}:{taint['effect']}, which is not tolerated"
    for resource, quantity in wanted.items():
        if parse_quantity(has.get(resource, "0")) < parse_quantity(quantity):
            return f"has {has.get(resource, 'no')} {resource}, not {quantity}"
    return ""


def _tolerates(toleration: dict[str, Any], taint: dict[str, Any]) -> bool:
    """As Kubernetes has it (v1.Toleration): no key with Exists is all keys, no effect all effects."""
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return (toleration.get("key"), toleration.get("value", "")) == (taint["key"], taint.get("value", ""))


def _job(site: Site, cluster: KubernetesCluster, folder: Path, nodes: int) -> Finding:
    """Have the server check a job as if it were to be made: rights, quotas, webhooks."""
    run = folder.absolute() / "doctor"
    job = Job(run, "export", nodes=nodes)
    stage = Stage("train", (Task(("pipeline", "network-check"), run),), nodes, cluster.processes)
    try:
        for text in manifests.render(job, [stage], cluster).values():
            for manifest in yaml.safe_load_all(text):
                site.create(manifest, dry_run=True)
    except LaunchError as error:
        return failed("job", str(error).replace("--run", "--folder"))
    return Finding("job", "ok", f"the server would take one of {nodes} nodes (nothing was made)")


def _nearest(name: str, listed: dict[str, Any]) -> str:
    """The nearest of the names that a list holds, or some of them."""
    names = [one["metadata"]["name"] for one in listed.get("items", [])]
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"one of {', '.join(names[:8]) or 'none'}"
