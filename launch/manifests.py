"""Manifests for Kubernetes: one object a task, filled into templates and checked before anybody sees them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import ValidationError

from launch import network
from launch.cluster import KubernetesCluster
from launch.job import Job, LaunchError, Stage, Task, seconds

TEMPLATES = Path(__file__).parent / "templates"
# Where ranks meet: Kubeflow Trainer's port too.
PORT = 29500
# Kubernetes adds up to 25 characters to the name of a job for that of a pod, of at most 63.
SLUG = 18
INSTALL = "Install what Kubernetes needs: `pip install '.[kubernetes]'`."


def render(job: Job, stages: Sequence[Stage], cluster: KubernetesCluster) -> dict[str, str]:
    """{NAME.yaml: its text}, which `kubectl apply -f` takes as it is.

    Raises:
        LaunchError: the job is not possible there, or a manifest is none.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    _check(job, stages, cluster)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"yaml": _yaml, "literal": literal}
    files = {}
    # Of a dataset's parts and its last step, one object takes care: its pods know their parts.
    for stage in stages[:1] if job.what == "data" else stages:
        for task in stage.tasks[:1] if job.what == "data" else stage.tasks:
            values = _values(job, stage, task, cluster, parts=len(stage.tasks) if len(stages) > 1 else 0)
            template = "trainjob.yaml.j2" if _is_train_job(stage, cluster) else "job.yaml.j2"
            text = environment.get_template(template).render(values)
            for manifest in yaml.safe_load_all(text):
                validate(manifest)
            files[f"{values['name']}.yaml"] = text
    return files


def name(run: Path, stage: str) -> str:
    """What a run's object is called: its folder's name, as far as Kubernetes allows, and a hash of its whole path."""
    ascii_ = unicodedata.normalize("NFKD", run.name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_).strip("-")
    if not slug[:1].isalpha():
        slug = f"run-{slug}"
    path = str(run.absolute()).encode("utf-8", "surrogateescape")
    return f"{slug[:SLUG].strip('-')}-{stage}-{hashlib.sha256(path).hexdigest()[:10]}"


def literal(text: str) -> str:
    """A text that Kubernetes leaves as it is: in arguments and variables it puts values for $(NAME)."""
    return text.replace("$", "$$")


def _yaml(value: object) -> str:
    """A value on one line of YAML, in quotes where that is needed."""
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)[1:-2]


def _check(job: Job, stages: Sequence[Stage], cluster: KubernetesCluster) -> None:
    if job.then:
        raise LaunchError(
            f"--then {job.then[0]}: Kubernetes starts no job after another. Submit without it; once `status` says "
            f"COMPLETED, submit --what {job.then[0]} with the same --run."
        )
    if not cluster.container:
        raise LaunchError("container: the cluster file names no image. launch/Containerfile builds one.")
    runs = [task.run for stage in stages for task in stage.tasks]
    for run in runs:
        if not str(run).isprintable():
            raise LaunchError(f"--run {str(run)!r}: a line of a manifest cannot hold such a name.")
        if not _on_volume(run.absolute(), cluster):
            paths = ", ".join(one.path for one in cluster.volumes if not one.read_only) or "none"
            raise LaunchError(
                f"--run {run}: {run.absolute()} would go with its pod, as it lies on none of the volumes that pods may "
                f"write to ({paths}). Choose a --run there, or add to `volumes` of the cluster file."
            )


def _on_volume(path: Path, cluster: KubernetesCluster) -> bool:
    return any(PurePosixPath(path).is_relative_to(one.path) for one in cluster.volumes if not one.read_only)


def _values(job: Job, stage: Stage, task: Task, cluster: KubernetesCluster, parts: int) -> dict[str, Any]:
    """What a template is filled in with."""
    own = name(task.run, "data" if job.what == "data" else stage.name)
    cores = cluster.cpus_per_process * stage.processes
    memory = {"memory": f"{cluster.memory_gb}Gi"} if cluster.memory_gb else {}
    devices = dict(cluster.resources) if stage.gpus else {}
    if stage.gpus and cluster.gpus_per_node:
        devices[cluster.gpu_resource] = str(stage.processes)
    meet = stage.nodes > 1
    return {
        "name": own,
        "stage": stage.name,
        "run": str(task.run.absolute()),
        "image": cluster.container,
        "runtime": cluster.runtime,
        "pods": parts or stage.nodes,
        "processes": stage.processes,
        "ranks_meet": meet,
        "arguments": list(_arguments(stage, task, cluster, parts)),
        "variables": _variables(cluster, own if meet and not _is_train_job(stage, cluster) else ""),
        "secrets": [(variable, *entry.split("/")) for variable, entry in cluster.secrets.items()],
        "fields": [
            ("JOB_UID", "metadata.labels['batch.kubernetes.io/controller-uid']"),
            ("PET_LOCAL_ADDR", "status.podIP"),
        ],
        "requests": {"cpu": str(cores), **memory, **devices},
        "limits": {**memory, **devices},
        "deadline": seconds(limit) if (limit := job.time or cluster.time) else None,
        "max_restarts": cluster.max_restarts,
        "stop_seconds": cluster.stop_seconds,
        "node_selector": cluster.node_selector,
        "tolerations": cluster.tolerations,
        "run_as": cluster.run_as,
        "shared_memory_gb": cluster.shared_memory_gb,
        "volumes": cluster.volumes,
    }


def _is_train_job(stage: Stage, cluster: KubernetesCluster) -> bool:
    return stage.name == "train" and cluster.kind == "trainjob"


def _arguments(stage: Stage, task: Task, cluster: KubernetesCluster, parts: int) -> Iterator[str]:
    """Of `python -m launch pod`."""
    yield f"--run={task.run.absolute()}"
    if _on_volume(Path.cwd(), cluster):
        yield f"--folder={Path.cwd()}"
    yield from (f"--nodes={stage.nodes}", f"--processes={stage.processes}")
    yield f"--restarts={cluster.max_restarts}"
    if stage.name == "train":
        yield "--trains"
    if parts:
        yield f"--parts={parts}"
    words = task.arguments
    yield from ("--", *(words[: words.index("--part")] if parts else words))


def _variables(cluster: KubernetesCluster, service: str) -> list[tuple[str, str, str]]:
    """(name, value, why) of each; the address of the first pod in `service`, which Trainer tells by itself."""
    chosen: list[tuple[str, str, str]] = [
        ("OMP_NUM_THREADS", str(cluster.cpus_per_process), "the cores of a rank"),
        *network.explained(cluster.network, cluster.interface),
        ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1", "ranks that meet again must not find what they left before"),
        ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(cluster.stop_seconds), "torchrun gives ranks this long to save"),
    ]
    if service:
        chosen += [
            ("PET_MASTER_ADDR", f"{service}-0.{service}", "where ranks meet: the first pod's name stays the same"),
            ("PET_MASTER_PORT", str(PORT), "… as it would be in a TrainJob"),
        ]
    own = [(variable, value, "") for variable, value in cluster.environment.items() if variable not in cluster.secrets]
    return [*(one for one in chosen if one[0] not in cluster.environment), *own]


def validate(manifest: dict[str, Any]) -> None:
    """See that an object is what its kind may be, with no field that the kind does not know.

    Raises:
        LaunchError: it is not, or what checks it is not installed.
    """
    try:
        import kubernetes_validate
        from kubeflow_trainer_api import models
    except ImportError as error:
        raise LaunchError(f"{error}. {INSTALL}") from error
    kind, of = manifest.get("kind"), manifest.get("metadata", {}).get("name")
    if manifest.get("apiVersion") == "trainer.kubeflow.org/v1alpha1":
        try:
            # These models drop what they do not know: what comes back must be what went in.
            model = getattr(models, f"TrainerV1alpha1{kind}").from_dict(manifest)
        except (AttributeError, ValidationError) as error:
            raise LaunchError(f"{kind} {of}: no valid manifest ({' '.join(str(error).split())}).") from error
        if unknown := list(_lost(manifest, model.to_dict(), "")):
            raise LaunchError(f"{kind} {of}: no valid manifest ({', '.join(unknown)} is no field of it).")
        return
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        where = ".".join(str(part) for part in error.path)
        raise LaunchError(f"{kind} {of}: no valid manifest ({where}: {error.message}).") from error
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
        raise LaunchError(f"{kind} {of}: no kind that Kubernetes knows ({error}).") from error


def _lost(before: object, after: object, path: str) -> Iterator[str]:
    """Paths of what is in the one and not, or another, in the other."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            yield from _lost(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _lost(one, other, f"{path}[{index}]")
    elif before != after:
        yield path
