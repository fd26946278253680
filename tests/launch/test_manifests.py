"""Manifests: what they ask for, that names survive them, and that a wrong one is refused."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launch import cluster, manifests
from launch.cluster import KubernetesCluster
from launch.job import Job, LaunchError, stages

BASE = {
    "backend": "kubernetes",
    "container": "registry.example.com/clip:1",
    "time": "1-00:00:00",
    "gpus_per_node": 4,
    "cpus_per_process": 6,
    "memory_gb": 100,
    "stop_seconds": 120,
    "max_restarts": 7,
    "volumes": [{"claim": "scratch", "path": "/scratch"}, {"claim": "data", "path": "/data", "read_only": True}],
    "secrets": {"WANDB_API_KEY": "wandb/api-key"},
    "shared_memory_gb": 16,
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "node_selector": {"zone": "b"},
    "environment": {"MINE": "a 'b' $(HOME) $$"},
}


def site(**changes: object) -> KubernetesCluster:
    found = cluster.parse(BASE | changes)
    assert isinstance(found, KubernetesCluster)
    return found


def training(**changes: object) -> Job:
    return Job(**({"run": Path("/scratch/runs/a"), "recipe": "coco", "data": "/data/mix", "nodes": 2} | changes))


def rendered(job: Job, where: KubernetesCluster) -> list[dict]:
    files = manifests.render(job, stages(job, where.processes), where)
    return [one for text in files.values() for one in yaml.safe_load_all(text)]


def expanded(text: str, variables: dict[str, str]) -> str:
    """What a kubelet makes of an argument: $$ is $, and $(NAME) the value of a variable that there is."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda found: "$" if found[0] == "$$" else variables.get(found[1], found[0]),
        text,
    )


def container_of(manifest: dict) -> dict:
    if manifest["kind"] == "TrainJob":
        return manifest["spec"]["trainer"]
    return manifest["spec"]["template"]["spec"]["containers"][0]


def variables_of(manifest: dict) -> dict[str, str]:
    return {one["name"]: expanded(one["value"], {}) for one in container_of(manifest)["env"] if "value" in one}


class TestJob:
    """`kind: job`: a Service for names, and an Indexed Job."""

    def test_what_it_asks_for(self):
        service, job = rendered(training(), site(kind="job", resources={"vpc.amazonaws.com/efa": 2}))
        name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
        assert service["spec"] == {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": name},
        }
        assert (service["metadata"]["name"], pod["subdomain"]) == (name, name)
        spec = job["spec"]
        assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
        assert (spec["activeDeadlineSeconds"], spec["backoffLimit"]) == (86400, 7)
        assert pod["restartPolicy"] == "Never"
        assert pod["terminationGracePeriodSeconds"] == 120
        assert (pod["tolerations"], pod["nodeSelector"]) == (BASE["tolerations"], {"zone": "b"})
        assert container_of(job)["resources"] == {
            "requests": {"cpu": "24", "memory": "100Gi", "vpc.amazonaws.com/efa": "2", "nvidia.com/gpu": "4"},
            "limits": {"memory": "100Gi", "vpc.amazonaws.com/efa": "2", "nvidia.com/gpu": "4"},
        }
        assert container_of(job)["volumeMounts"] == [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "volume-1", "mountPath": "/scratch", "readOnly": False},
            {"name": "volume-2", "mountPath": "/data", "readOnly": True},
        ]
        assert pod["volumes"][0] == {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}
        assert pod["volumes"][1]["persistentVolumeClaim"] == {"claimName": "scratch"}
        assert "securityContext" not in pod

    def test_ranks_meet_at_the_first_pods_name(self):
        service, job = rendered(training(), site(kind="job"))
        name = service["metadata"]["name"]
        assert variables_of(job)["PET_MASTER_ADDR"] == f"{name}-0.{name}"

    def test_what_the_user_must_change_fails_it_and_what_the_cluster_does_counts_for_nothing(self):
        job = rendered(training(), site(kind="job"))[-1]
        fail, ignore = job["spec"]["podFailurePolicy"]["rules"]
        assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [1, 2])
        assert fail["onExitCodes"]["containerName"] == container_of(job)["name"]
        assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")

    def test_one_node_needs_no_service_and_no_gpus_where_there_are_none(self):
        (job,) = rendered(training(nodes=1), site(kind="job", gpus_per_node=0, memory_gb=None, run_as=1234))
        assert container_of(job)["resources"] == {"requests": {"cpu": "6"}, "limits": {}}
        assert job["spec"]["template"]["spec"]["securityContext"] == {
            **{"runAsUser": 1234, "runAsGroup": 1234, "fsGroup": 1234}
        }


class TestTrainJob:
    """`kind: trainjob`, for training; other stages have no ranks on several nodes."""

    def test_what_it_asks_for(self):
        (job,) = rendered(training(), site())
        assert job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        spec = job["spec"]
        assert (spec["runtimeRef"], spec["activeDeadlineSeconds"]) == ({"name": "torch-distributed"}, 86400)
        assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (2, 4)
        assert spec["trainer"]["image"] == BASE["container"]
        assert spec["trainer"]["resourcesPerNode"]["limits"] == {"memory": "100Gi", "nvidia.com/gpu": "4"}
        (of_node,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod = of_node["template"]["spec"]["template"]["spec"]
        assert (of_node["name"], pod["containers"][0]["name"]) == ("node", "node")
        assert [one["mountPath"] for one in pod["containers"][0]["volumeMounts"]] == ["/dev/shm", "/scratch", "/data"]
        assert [one["name"] for one in pod["volumes"]] == ["shm", "volume-1", "volume-2"]
        assert pod["terminationGracePeriodSeconds"] == 120

    def test_it_leaves_to_trainer_what_trainer_sets(self):
        """Trainer refuses jobs that set these."""
        reserved = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
        assert not reserved & {one["name"] for one in container_of(rendered(training(), site())[0])["env"]}

    def test_evaluation_is_a_plain_job(self):
        (job,) = rendered(training(what="evaluate", nodes=1), site())
        assert job["kind"] == "Job"

    def test_the_runtime_with_exit_codes_is_one(self):
        """What an administrator may install."""
        text = (manifests.TEMPLATES / "runtime.yaml").read_text()
        manifests.validate(yaml.safe_load(text))
        assert "restartPolicy: Never" in text


@pytest.mark.parametrize("kind", ["job", "trainjob"])
class TestBoth:
    def test_variables(self, kind):
        found = variables_of(rendered(training(), site(kind=kind, network="ethernet", interface="eth0"))[-1])
        assert found["MINE"] == BASE["environment"]["MINE"]
        assert (
            found.items()
            >= {
                "NCCL_DEBUG": "WARN",
                "NCCL_NET": "Socket",
                "GLOO_SOCKET_IFNAME": "eth0",
                "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
                "OMP_NUM_THREADS": "6",
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120",
            }.items()
        )

    def test_the_cluster_files_own_variables_win_and_none_is_there_twice(self, kind):
        job = rendered(training(), site(kind=kind, environment={"NCCL_DEBUG": "INFO"}))[-1]
        assert variables_of(job)["NCCL_DEBUG"] == "INFO"
        names = [one["name"] for one in container_of(job)["env"]]
        assert len(names) == len(set(names))

    def test_secrets_are_named_only(self, kind):
        (entry,) = [
            one for one in container_of(rendered(training(), site(kind=kind))[-1])["env"] if "WANDB" in one["name"]
        ]
        assert entry == {
            "name": "WANDB_API_KEY",
            "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api-key"}},
        }

    @pytest.mark.parametrize(
        "run",
        ["a b", "it's", 'say "x"', "$(HOME)", "$$HOME", "`id`", "#é ü 猫", "🐈", ": - {x}", "a\\b", "--", "*", "~"],
    )
    def test_names_survive(self, kind, run, tmp_path):
        """As YAML, as what a kubelet makes of it, and as words of a command."""
        job = training(run=Path("/scratch") / run, data=f"/data/{run}", settings=(f"tokenizer.path={run}",))
        manifest = rendered(job, site(kind=kind))[-1]
        fake = tmp_path / "python"
        fake.write_text('#!/bin/bash\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
        container = container_of(manifest)
        words = [expanded(word, {"HOME": "/wrong"}) for word in container["command"] + container["args"]]
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        told = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.split("\0")
        assert told[:4] == ["-m", "launch", "pod", f"--run=/scratch/{run}"]
        (task,) = stages(job, 4)[0].tasks
        assert tuple(told[told.index("--") + 1 : -1]) == task.arguments

    def test_a_typo_in_a_template_is_refused(self, kind, tmp_path, monkeypatch):
        """At whatever depth; the models of one kind drop what they do not know without a word."""
        texts = {path.name: path.read_text() for path in manifests.TEMPLATES.glob("*.yaml.j2")}
        monkeypatch.setattr(manifests, "TEMPLATES", tmp_path)
        for key in (
            "args:",
            "env:",
            "terminationGracePeriodSeconds:",
            "mountPath:",
            "emptyDir:",
            "activeDeadlineSeconds:",
        ):
            for name, text in texts.items():
                (tmp_path / name).write_text(text.replace(key, f"x{key}"))
            with pytest.raises(LaunchError, match=r"no valid manifest.*" + key[:-1]):
                rendered(training(), site(kind=kind))

    def test_a_wrong_type_is_refused(self, kind):
        with pytest.raises(LaunchError, match="no valid manifest"):
            rendered(training(), site(kind=kind, tolerations=[{"tolerationSeconds": "long"}]))


@pytest.mark.parametrize("kind", ["job", "trainjob"])
def test_without_a_time_there_is_no_limit(kind):
    job = rendered(training(), site(kind=kind, time=None))[-1]
    assert "activeDeadlineSeconds" not in job["spec"]


def test_a_sweep_is_an_object_a_run():
    job = training(sweep=("optim.lr=1e-3,1e-4",))
    names = [one["metadata"]["name"] for one in rendered(job, site())]
    assert len(set(names)) == 2
    assert all(name.startswith("optim-lr-1e") for name in names)


def test_a_dataset_is_one_job_with_a_pod_a_part():
    """Each knows its part by its index; the command is the last step's."""
    (job,) = rendered(Job(Path("/scratch/x"), what="data", data="coco=/data/coco", nodes=3), site())
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 3)
    assert "nvidia.com/gpu" not in json.dumps(job["spec"]["template"]["spec"]["containers"])
    words = container_of(job)["args"]
    assert "--parts=3" in words
    assert words[words.index("--") + 1 :] == ["data_prep", "build", "coco=/data/coco", "--out", "/scratch/x"]
    (job,) = rendered(Job(Path("/scratch/x"), what="data", data="coco=/data/coco"), site())
    assert not [word for word in container_of(job)["args"] if word.startswith("--parts")]


@given(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=120))
def test_any_run_folder_has_a_name_that_kubernetes_takes(text):
    """RFC 1035 for Services and Trainer; 63 characters with all that it adds for pods of up to 10,000 nodes."""
    for stage in ("train", "evaluate", "export", "data"):
        found = manifests.name(Path("/scratch") / text, stage)
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", found)
        assert len(f"{found}-node-0-9999-abcde") <= 63


def test_names_of_two_runs_differ_where_only_their_places_or_odd_characters_do():
    paths = ("/scratch/a/x", "/scratch/b/x", "/scratch/a/x y", "/scratch/a/x_y", "/scratch/a/é", "/scratch/a/猫")
    assert len({manifests.name(Path(path), "train") for path in paths}) == len(paths)


@pytest.mark.parametrize(
    ("job", "changes", "told"),
    [
        ({"run": Path("/home/me/run")}, {}, r"/home/me/run would go with its pod.*\(/scratch\)"),
        ({"run": Path("/data/run")}, {}, r"would go with its pod"),
        ({"run": Path("/scratch/a\nb")}, {}, r"cannot hold such a name"),
        ({"then": ("evaluate",)}, {}, r"--then evaluate.*submit --what evaluate"),
        ({}, {"container": ""}, r"container.*Containerfile"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fix(job, changes, told):
    with pytest.raises(LaunchError, match=told):
        rendered(training(**job), site(**changes))


def test_a_secret_in_place_of_its_name_is_refused_and_not_shown(tmp_path):
    """Nor does it come into the message."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(BASE | {"secrets": {"WANDB_API_KEY": "0123456789abcdef"}}))
    with pytest.raises(LaunchError, match="SECRET/KEY") as raised:
        cluster.load(str(path))
    assert "0123456789" not in str(raised.value)


def test_relative_paths_begin_where_they_were_written_if_pods_see_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = site(volumes=[{"claim": "scratch", "path": str(tmp_path)}])
    job = rendered(training(run=Path("run"), data="mix"), there)[-1]
    assert f"--folder={tmp_path}" in container_of(job)["args"]
    assert f"--run={tmp_path}/run" in container_of(job)["args"]
