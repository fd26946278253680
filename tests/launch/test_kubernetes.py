"""Jobs on Kubernetes, against a stand-in for its API server: what is made, followed, taken back, and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import kubernetes, submission
from launch.__main__ import main
from launch.cluster import KubernetesCluster, parse
from launch.job import Job, LaunchError, stages
from tests.launch.kubernetes_api import TOKEN, ApiServer, serving

SERVICES = "/api/v1/namespaces/vision/services"
PODS = "/api/v1/namespaces/vision/pods"
JOBS = "/apis/batch/v1/namespaces/vision/jobs"
TRAINJOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/vision/trainjobs"
PLACES = {"job": JOBS, "trainjob": TRAINJOBS}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with serving(tmp_path / "kubeconfig") as server:
        yield server


class Site:
    """A cluster file, and what is done with a run there."""

    def __init__(self, folder: Path, **changes: object) -> None:
        values = {
            "backend": "kubernetes",
            "context": "here",
            "namespace": "vision",
            "container": "clip:1",
            "time": "01:00:00",
            "volumes": [{"claim": "scratch", "path": str(folder)}],
            "secrets": {"WANDB_API_KEY": "wandb/api-key"},
        } | changes
        cluster = parse(values)
        assert isinstance(cluster, KubernetesCluster)
        self.cluster, self.run = cluster, folder / "my run"
        self.file = folder / "site.yaml"
        self.file.write_text(yaml.safe_dump(values))

    def submit(self, **changes: Any) -> dict[str, str]:
        job = Job(**({"run": self.run, "recipe": "coco", "data": "/data/mix", "nodes": 2} | changes))
        parts = stages(job, self.cluster.processes)
        files = kubernetes.render(job, parts, self.cluster)
        assert kubernetes.submit(job, parts, self.cluster, submission.keep(job.records, files)) == 0
        return files

    def submitted(self) -> submission.Submission:
        return submission.recorded(self.run)

    def state(self) -> dict[str, Any]:
        (row,) = kubernetes.states(self.submitted())
        return row


def pod(name: str, job: str, index: int = 0, phase: str = "Running", **changes: Any) -> tuple[str, dict[str, Any]]:
    """A pod's address, and what the API says of it."""
    status = {"name": "node", "image": "clip:1", "imageID": "", "ready": True, "restartCount": 0}
    return f"{PODS}/{name}", {
        "metadata": {
            "name": name,
            "labels": {"batch.kubernetes.io/job-name": job, "jobset.sigs.k8s.io/jobset-name": job},
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
            "creationTimestamp": changes.get("created", "2026-01-01T00:00:00Z"),
        },
        "spec": {"containers": [{"name": "node"}], "nodeName": changes.get("node", f"machine-{index}")},
        "status": {
            "phase": phase,
            "conditions": changes.get("conditions", []),
            "containerStatuses": [status | changes.get("container", {})],
        },
    }


def ended(code: int, at: str) -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "finishedAt": at}}


@pytest.mark.parametrize("kind", ["job", "trainjob"])
class TestSubmit:
    def test_what_was_rendered_is_tried_and_then_made(self, server, tmp_path, kind):
        files = Site(tmp_path, kind=kind).submit()
        objects = [one for text in files.values() for one in yaml.safe_load_all(text)]
        assert server.posted(dry_run=True) == objects
        assert server.posted(dry_run=False) == objects
        posts = [query for method, _, query, _ in server.requests if method == "POST"]
        assert [query.get("dryRun") for query in posts] == ["All"] * len(objects) + [None] * len(objects)
        # Else an older server would drop what it does not know, volumes for instance.
        assert {query["fieldValidation"] for query in posts} == {"Strict"}
        assert set(server.objects) == {
            *(f"{PLACES[kind]}/{one['metadata']['name']}" for one in objects if one["kind"] != "Service"),
            *(f"{SERVICES}/{one['metadata']['name']}" for one in objects if one["kind"] == "Service"),
        }

    def test_a_service_that_is_left_without_its_job_is_no_obstacle(self, server, tmp_path, kind):
        site = Site(tmp_path, kind=kind)
        site.submit()
        objects = set(server.objects)
        for place in [one for one in server.objects if one.startswith(PLACES[kind])]:
            del server.objects[place]  # as by `kubectl delete job`
        site.submit()
        assert set(server.objects) == objects

    def test_what_was_made_is_recorded(self, server, tmp_path, kind):
        site = Site(tmp_path, kind=kind)
        (name,) = site.submit()
        (one,) = site.submitted().jobs
        name, kinds = name.removesuffix(".yaml"), {"job": "Job", "trainjob": "TrainJob"}
        assert (one.stage, one.id, one.runs) == ("train", f"{kinds[kind]}/{name}", (str(site.run),))
        assert site.submitted().cluster == site.cluster

    def test_each_run_of_a_sweep_is_one(self, server, tmp_path, kind):
        site = Site(tmp_path, kind=kind)
        site.submit(sweep=("optim.lr=1e-3,1e-4",))
        runs = [Path(one.runs[0]).name for one in site.submitted().jobs]
        assert sorted(runs) == ["optim.lr=1e-3", "optim.lr=1e-4"]
        assert len({one.id for one in site.submitted().jobs}) == 2

    @pytest.mark.parametrize(
        ("status", "message", "told"),
        [
            (403, 'jobs is forbidden: User "me" cannot create', "cannot create.*kubectl auth can-i"),
            (404, "the server could not find the requested resource", "requested resource.*kind: job"),
            (422, "spec.template: Invalid value", "Invalid value.*cluster file"),
            (500, "admission webhook denied", "admission webhook denied"),
        ],
    )
    def test_a_refusal_is_told_with_its_fix_and_nothing_is_made(self, server, tmp_path, kind, status, message, told):
        server.refusals["POST", PLACES[kind]] = (status, message)
        with pytest.raises(LaunchError, match=told):
            Site(tmp_path, kind=kind).submit()
        assert not server.objects

    def test_a_run_that_has_not_ended_is_not_submitted_again(self, server, tmp_path, kind):
        site = Site(tmp_path, kind=kind)
        site.submit()
        with pytest.raises(LaunchError, match=r"has not ended.*cancel"):
            site.submit()
        assert not [method for method, *_ in server.requests if method == "DELETE"]

    @pytest.mark.parametrize("condition", ["Complete", "Failed"])
    def test_one_that_has_ended_makes_way(self, server, tmp_path, kind, condition):
        site = Site(tmp_path, kind=kind)
        (name,) = site.submit()
        place = f"{PLACES[kind]}/{name.removesuffix('.yaml')}"
        server.objects[place]["status"] = {"conditions": [{"type": condition, "status": "True"}]}
        site.submit()
        assert "status" not in server.objects[place]

    def test_no_secret_is_in_a_request_or_said(self, server, tmp_path, kind, monkeypatch, capfd):
        """Neither the kubeconfig's token nor what the Secret holds; RUN/launch has neither."""
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
        site = Site(tmp_path, kind=kind)
        words = ["--run", str(site.run), "--cluster", str(site.file), "--recipe", "coco", "--data", "/data/mix"]
        assert main(["submit", *words]) == 0
        server.refusals["POST", PLACES[kind]] = (403, "forbidden")
        assert main(["cancel", str(site.run)]) == 0
        assert main(["submit", *words]) == 2
        said = "".join(capfd.readouterr())
        kept = "".join(path.read_text() for path in (site.run / "launch").iterdir() if path.is_file())
        sent = json.dumps([(query, body) for *_, query, body in server.requests])
        for secret in ("0123456789abcdef", TOKEN):
            assert secret not in said + kept + sent

    def test_cancel_takes_all_of_it_back_and_once_more_is_no_error(self, server, tmp_path, kind):
        """In the foreground: it is gone once its pods are, which have been asked to stop."""
        site = Site(tmp_path, kind=kind)
        site.submit()
        kubernetes.cancel(site.submitted())
        assert not server.objects
        kubernetes.cancel(site.submitted())
        assert site.state()["state"] == ""
        deletes = [query for method, path, query, _ in server.requests if method == "DELETE" and "services" not in path]
        assert {query["propagationPolicy"] for query in deletes} == {"Foreground"}


@pytest.mark.parametrize("kind", ["job", "trainjob"])
class TestFollow:
    @pytest.fixture
    def there(self, server, tmp_path, kind) -> tuple[Site, str, dict[str, Any]]:
        site = Site(tmp_path, kind=kind)
        (name,) = site.submit()
        name = name.removesuffix(".yaml")
        return site, name, server.objects[f"{PLACES[kind]}/{name}"]

    def test_nothing_runs_yet(self, server, there):
        site, name, _ = there
        assert (site.state()["state"], site.state()["reason"]) == ("PENDING", "0 of 2 pods run")
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/4 nodes"}
        server.objects |= [pod("a-0", name), pod("a-1", name, 1, "Pending", node=None, conditions=[condition])]
        assert (site.state()["state"], site.state()["reason"]) == ("PENDING", "Unschedulable: 0/4 nodes")
        waiting = {"state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}
        server.objects |= [pod("a-1", name, 1, "Pending", container=waiting)]
        assert site.state()["reason"] == "ErrImagePull: no such image"

    def test_all_pods_run(self, server, there):
        site, name, _ = there
        lost = pod("a-1-old", name, 1, "Failed", created="2025-12-31T00:00:00Z", node="lost")
        server.objects |= [pod("a-0", name, container={"restartCount": 2}), lost, pod("a-1", name, 1)]
        state = site.state()
        assert (state["state"], state["reason"], state["restarts"]) == ("RUNNING", "", 3)
        assert state["nodes"] == "machine-0,lost,machine-1"
        assert (state["stage"], state["run"]) == ("train", str(site.run))

    @pytest.mark.parametrize(
        ("condition", "state", "reason"),
        [
            ({"type": "Complete"}, "COMPLETED", ""),
            ({"type": "Failed", "reason": "PodFailurePolicy", "message": "exit code 2"}, "FAILED", "exit code 2"),
            ({"type": "Failed", "reason": "DeadlineExceeded"}, "FAILED", "DeadlineExceeded"),
            ({"type": "Suspended", "reason": "JobSuspended"}, "SUSPENDED", "JobSuspended"),
        ],
    )
    def test_it_ended(self, there, condition, state, reason):
        site, _, job = there
        job["status"] = {"conditions": [{"type": "Created", "status": "True"}, condition | {"status": "True"}]}
        found = site.state()
        assert found["state"] == state
        assert reason in found["reason"]

    def test_the_lines_are_those_of_what_failed_first(self, server, there):
        """Even where another container of the same pod has followed; else those of the first pod."""
        site, name, _ = there
        server.objects |= [pod("a-0", name), pod("a-1", name, 1)]
        server.logs |= {f"{PODS}/a-0/log": "all is well\n", f"{PODS}/a-1/log": "CUDA error\n"}
        assert kubernetes.last_lines(site.submitted(), 5) == "--- a-0\nall is well\n"
        last = {"lastState": ended(137, "2026-01-01T00:00:05Z")}
        server.objects |= [
            pod("a-0", name, container={"state": ended(1, "2026-01-01T00:00:09Z")}),
            pod("a-1", name, 1, container=last),
        ]
        told = kubernetes.last_lines(site.submitted(), 5)
        assert told == "--- a-1 failed first (exit code 137)\nCUDA error\n"
        (query,) = [query for _, path, query, _ in server.requests if path == f"{PODS}/a-1/log"]
        assert query == {"tailLines": "5", "previous": "true"}


def test_a_server_that_is_not_there_is_named(server, tmp_path):
    with pytest.raises(LaunchError, match=r"http://127.0.0.1:1 does not answer.*context"):
        Site(tmp_path, context="elsewhere").submit()


def test_the_context_is_looked_up(server, tmp_path):
    with pytest.raises(LaunchError, match=r"nowhere.*kubectl config get-contexts"):
        Site(tmp_path, context="nowhere").submit()


def test_without_a_kubeconfig_it_is_said_where_one_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(LaunchError, match="KUBECONFIG"):
        Site(tmp_path).submit()
