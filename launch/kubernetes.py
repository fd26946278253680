"""Jobs on Kubernetes: objects are made through its API, as kubectl would, and followed there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch import submission
from launch.cluster import KubernetesCluster
from launch.job import Job, LaunchError, Stage
from launch.manifests import INSTALL, render
from launch.submission import Submission, Submitted

__all__ = ["cancel", "last_lines", "render", "states", "submit"]

# kind → (group, version, plural), and the label by which its pods are known.
KINDS = {
    "Job": ("batch", "v1", "jobs"),
    "TrainJob": ("trainer.kubeflow.org", "v1alpha1", "trainjobs"),
}
PODS = {"Job": "batch.kubernetes.io/job-name", "TrainJob": "jobset.sigs.k8s.io/jobset-name"}
# An API server answers at once, or is not there; what was removed is gone once its pods are.
PATIENCE_S, REMOVAL_S = 30, 120
# Status of the answer → the fix.
FIXES = {
    401: "log in anew; `kubectl get jobs` must work",
    403: "ask for the rights to create, get and delete jobs, trainjobs and services, and to list pods and read their "
    "logs, in this namespace; `kubectl auth can-i --list` shows those you have",
    404: "`namespace` of the cluster file; and for a TrainJob, is Kubeflow Trainer 2.3 or newer installed? `kind: job` "
    "does without",
    409: "wait until it is gone, then submit again",
    422: "what it names, in the cluster file",
}
ABSENT: dict[int, Any] = {404: {}}
# Words for states, as SLURM has them.
PENDING, RUNNING, DONE, FAILED, STOPPED = "PENDING", "RUNNING", "COMPLETED", "FAILED", "SUSPENDED"
CONDITIONS = {"Complete": DONE, "Failed": FAILED, "Suspended": STOPPED}


class Api:
    """The API server of a cluster file; whatever it refuses becomes a LaunchError with the fix."""

    def __init__(self, cluster: KubernetesCluster) -> None:
        try:
            from kubernetes import client, config
        except ImportError as error:
            raise LaunchError(f"{error}. {INSTALL}") from error
        settings = client.Configuration()
        settings.retries = False  # else three more tries, before anybody hears of a server that is not there
        try:
            config.load_kube_config(
                # Its own default is what the variable held when it was imported.
                os.environ.get("KUBECONFIG") or config.KUBE_CONFIG_DEFAULT_LOCATION,
                context=cluster.context or None,
                client_configuration=settings,
                persist_config=False,
            )
        except (config.ConfigException, OSError) as error:
            raise LaunchError(
                f"no way to Kubernetes: {error} `kubectl config get-contexts` lists what `context` of the cluster file "
                "may be; KUBECONFIG, or ~/.kube/config, is where they are."
            ) from error
        api = client.ApiClient(settings)
        self._host, self._namespace = settings.host, cluster.namespace
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    def create(self, manifest: dict[str, Any], *, dry_run: bool) -> None:
        """Make an object, or have the server only check it, webhooks included. A field it does not know is an error."""
        kind = manifest["kind"]
        how: dict[str, Any] = {"field_validation": "Strict", **({"dry_run": "All"} if dry_run else {})}
        what = f"create {kind} {manifest['metadata']['name']}"
        if kind == "Service":
            # One that an earlier submission of the run has left is the same.
            self._ask(what, self._core.create_namespaced_service, self._namespace, manifest, instead={409: None}, **how)
        else:
            self._ask(what, self._objects.create_namespaced_custom_object, *self._place(kind), manifest, **how)

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """A job; an empty one where there is none."""
        what, call = f"get {kind} {name}", self._objects.get_namespaced_custom_object
        return self._ask(what, call, *self._place(kind), name, instead=ABSENT)  # type: ignore[no-any-return]

    def delete(self, kind: str, name: str) -> None:
        """Remove a job, its pods (which are asked to stop first) and its Service, as far as they are there."""
        what, call = f"delete {kind} {name}", self._objects.delete_namespaced_custom_object
        self._ask(what, call, *self._place(kind), name, instead=ABSENT, propagation_policy="Foreground")
        if kind == "Job":
            call = self._core.delete_namespaced_service
            self._ask(f"delete Service {name}", call, name, self._namespace, instead=ABSENT)

    def pods(self, kind: str, name: str) -> list[Any]:
        """The pods of a job, by index, and of one index by age."""
        what, label = f"list pods of {kind} {name}", f"{PODS[kind]}={name}"
        found = self._ask(what, self._core.list_namespaced_pod, self._namespace, label_selector=label).items
        return sorted(found, key=lambda pod: (_index(pod), pod.metadata.creation_timestamp))

    def log(self, pod: Any, lines: int, *, previous: bool) -> str:
        """The last lines that a pod's container wrote, or the one before it in the same pod."""
        name, call = pod.metadata.name, self._core.read_namespaced_pod_log
        what = f"read the log of {name}"
        return str(self._ask(what, call, name, self._namespace, tail_lines=lines, previous=previous))

    def _place(self, kind: str) -> tuple[str, str, str, str]:
        group, version, plural = KINDS[kind]
        return group, version, self._namespace, plural

    def _ask(
        self,
        what: str,
        call: Callable[..., Any],
        *words: Any,
        instead: Mapping[int, Any] | None = None,
        **more: Any,
    ) -> Any:
        """What the server answers; where it is one of the errors of `instead`, the value that stands there."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return call(*words, _request_timeout=PATIENCE_S, **more)
        except ApiException as error:
            if instead and error.status in instead:
                return instead[error.status]
            fix = f" The fix: {FIXES[error.status]}." if error.status in FIXES else ""
            raise LaunchError(f"{what}: {_said(error)}.{fix}") from error
        except (HTTPError, OSError) as error:
            raise LaunchError(
                f"{what}: {self._host} does not answer ({type(error).__name__}). Is it the right `context`, and are "
                "you in its network? `kubectl get jobs` must work."
            ) from error


def submit(job: Job, stages: Sequence[Stage], cluster: KubernetesCluster, folder: Path) -> int:
    """Make the objects that were rendered into `folder`; the server looks at all of them first.

    Raises:
        LaunchError: the server is not there or refuses one; none was made then. Or the run is running already.
    """
    api = Api(cluster)
    manifests = [one for path in sorted(folder.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text("utf-8"))]
    jobs = [one for one in manifests if one["kind"] in KINDS]
    for manifest in jobs:
        _make_way(api, manifest["kind"], manifest["metadata"]["name"])
    for dry_run in (True, False):
        submitted: list[Submitted] = []
        for manifest in manifests:
            api.create(manifest, dry_run=dry_run)
            if manifest in jobs and not dry_run:
                about = manifest["metadata"]
                stage, run = (about["annotations"][f"clip-pipeline/{key}"] for key in ("stage", "run"))
                submitted.append(Submitted(stage, f"{manifest['kind']}/{about['name']}", (run,)))
                submission.record(job.records, Submission(cluster, tuple(submitted)))
    return 0


def _make_way(api: Api, kind: str, name: str) -> None:
    """Remove what an earlier submission of the same run has left."""
    found = api.get(kind, name)
    if not found:
        return
    if _condition(found)[0] not in (DONE, FAILED):
        raise LaunchError(
            f"{kind} {name} of the same --run has not ended. `python -m launch status` shows it, and `cancel` ends it; "
            "what is saved is kept, and the same submit goes on with it."
        )
    api.delete(kind, name)
    until = time.monotonic() + REMOVAL_S
    while api.get(kind, name):
        if time.monotonic() > until:
            raise LaunchError(
                f"{kind} {name} has ended, and does not go. `kubectl describe {kind} {name}` may say why."
            )
        time.sleep(1)


def cancel(found: Submission) -> None:
    """Take all jobs back. Their pods are asked to stop, and have stop_seconds to save."""
    api = _api(found)
    for one in found.jobs:
        kind, _, name = one.id.partition("/")
        api.delete(kind, name)


def states(found: Submission) -> list[dict[str, Any]]:
    """Of each job {stage, run, id, state, restarts, reason, nodes}, as the API server knows it.

    A state is PENDING, RUNNING, COMPLETED, FAILED, SUSPENDED or, of a job that was removed, "". Restarts are those of
    pods and containers; how often a pod has started its program again, its log says.
    """
    api = _api(found)
    rows = []
    for one in found.jobs:
        kind, _, name = one.id.partition("/")
        there = api.get(kind, name)
        pods = api.pods(kind, name) if there else []
        state, reason = _condition(there) if there else ("", "")
        if there and not state:
            # Of each index the newest pod only.
            newest = {_index(pod): pod for pod in pods}.values()
            running = [pod for pod in newest if pod.status.phase in ("Running", "Succeeded")]
            wanted = _wanted(there)
            state = RUNNING if len(running) >= wanted else PENDING
            reason = "" if state == RUNNING else _why_not_running(newest, len(running), wanted)
        rows.append(
            {
                "stage": one.stage,
                "run": one.runs[0],
                "id": one.id,
                "state": state,
                "restarts": sum(1 for pod in pods if pod.status.phase == "Failed") + sum(map(_restarts, pods)),
                "reason": reason,
                "nodes": ",".join(dict.fromkeys(pod.spec.node_name for pod in pods if pod.spec.node_name)),
            }
        )
    return rows


def last_lines(found: Submission, lines: int) -> str:
    """The last lines of each job's pod that failed first; of its first pod, where none has."""
    api = _api(found)
    told = []
    for one in found.jobs:
        kind, _, name = one.id.partition("/")
        pods = api.pods(kind, name)
        failures = sorted(
            (at, number, code, before) for number, pod in enumerate(pods) for at, code, before in _ends(pod)
        )
        if failures:
            _, number, code, before = failures[0]
            text = api.log(pods[number], lines, previous=before)
            told.append(f"--- {pods[number].metadata.name} failed first (exit code {code})\n{text}")
        elif pods:
            told.append(f"--- {pods[0].metadata.name}\n{api.log(pods[0], lines, previous=False)}")
        else:
            told.append(f"--- {one.id} has no pods\n")
    return "".join(told)


def _api(found: Submission) -> Api:
    assert isinstance(found.cluster, KubernetesCluster)
    return Api(found.cluster)


def _condition(thing: dict[str, Any]) -> tuple[str, str]:
    """(state, why) of an object that has ended or was suspended; else two empty texts."""
    for one in thing.get("status", {}).get("conditions") or []:
        if one["status"] == "True" and one["type"] in CONDITIONS:
            state = CONDITIONS[one["type"]]
            return state, "" if state == DONE else f"{one.get('reason', '')}: {one.get('message', '')}".strip(": ")
    return "", ""


def _wanted(thing: dict[str, Any]) -> int:
    """How many pods an object has when all of it runs."""
    spec = thing["spec"]
    return int(spec["parallelism"] if thing["kind"] == "Job" else spec["trainer"]["numNodes"])


def _why_not_running(pods: Any, running: int, wanted: int) -> str:
    for pod in pods:
        for one in pod.status.container_statuses or []:
            if one.state and one.state.waiting and one.state.waiting.reason != "ContainerCreating":
                return f"{one.state.waiting.reason}: {one.state.waiting.message or ''}".strip(": ")
        for condition in pod.status.conditions or []:
            if condition.type == "PodScheduled" and condition.status == "False":
                return f"{condition.reason}: {condition.message or ''}".strip(": ")
    return f"{running} of {wanted} pods run"


def _restarts(pod: Any) -> int:
    return sum(one.restart_count for one in pod.status.container_statuses or [])


def _index(pod: Any) -> int:
    return int((pod.metadata.annotations or {}).get("batch.kubernetes.io/job-completion-index", 0))


def _ends(pod: Any) -> Iterator[tuple[Any, int, bool]]:
    """(when, exit code, whether another container has followed) of each failure of a pod's that is still known."""
    for one in pod.status.container_statuses or []:
        for state, before in ((one.last_state, True), (one.state, False)):
            if state and state.terminated and state.terminated.exit_code:
                yield state.terminated.finished_at, state.terminated.exit_code, before


def _said(error: Any) -> str:
    """What the server says itself, of an answer that is no success."""
    try:
        return str(json.loads(error.body)["message"]).rstrip(".")
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"
