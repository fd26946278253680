"""The cluster file: what a site is like, so that a job needs to say nothing about it."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from launch.job import SECRET_ADDRESS, LaunchError, seconds

CLUSTERS = Path(__file__).parent / "clusters"
# Values of such variables are never written down. TOKENIZERS_PARALLELISM is none.
SECRET = re.compile(r"TOKEN(?!I)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)


def _checked_time(time: object) -> object:
    """YAML 1.1 reads 24:00:00 as a number of seconds, if it is not in quotes."""
    if isinstance(time, int):
        minutes, rest = divmod(time, 60)
        time = f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"
    if isinstance(time, str):
        seconds(time)
    return time


def _no_secrets(variables: dict[str, str]) -> dict[str, str]:
    for name, value in variables.items():
        if SECRET.search(name) or SECRET_ADDRESS.search(value):
            raise ValueError(f"{name} looks like a secret, which must not be in a file like this; see `secrets`")
    return variables


def _no_secrets_set(lines: list[str]) -> list[str]:
    """Of shell lines and options; a file that they read may hold secrets, and is named by a variable or a path."""
    for name, value in re.findall(r"(\w+)=([^\s;,]*)", "\n".join(lines)):
        if SECRET.search(name) and not re.match(r"[\"']?[$/~]|[\"']*$", value):
            raise ValueError(f"{name} looks like a secret, which must not be in a file like this; see `secrets`")
    if any(map(SECRET_ADDRESS.search, lines)):
        raise ValueError("an address with a password or a key must not be in a file like this; see `secrets`")
    return lines


def _secret_entry(entry: str) -> str:
    """Names of Secrets are domain names; keys have dots, dashes and underscores. What is found may be the secret."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9._-]+", entry):
        raise ValueError("write SECRET/KEY, the names of a Secret and of an entry in it; never the secret itself")
    return entry


Time = Annotated[str, BeforeValidator(_checked_time)]
Lines = Annotated[list[str], AfterValidator(_no_secrets_set)]
SecretEntry = Annotated[str, AfterValidator(_secret_entry)]
Network = Literal["ethernet", "infiniband", "efa"]


class Cluster(BaseModel):
    """What all kinds of clusters have."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    environment: Annotated[dict[str, str], AfterValidator(_no_secrets)] = Field(
        {}, description="variables of every process; no secrets, which `secrets` is for"
    )


class LocalCluster(Cluster):
    """This machine; no scheduler."""

    backend: Literal["local"]
    processes: int = Field(1, gt=0, description="ranks, where a job does not say: CPU processes, or one a GPU")


class RemoteCluster(Cluster):
    """What clusters have that run jobs elsewhere, and later."""

    gpus_per_node: int = Field(0, ge=0, description="GPUs on a node, and so ranks on it; 0: one CPU process a node")
    cpus_per_process: int = Field(1, gt=0, description="processor cores a rank: its own threads and its loaders")
    memory_gb: int | None = Field(None, gt=0, description="memory of a node; null: what the site gives by default")
    stop_seconds: int = Field(
        300,
        gt=0,
        le=65535,
        description="how long before its time limit a job is asked to stop; one that has not saved by then loses what "
        "came after its last checkpoint",
    )
    max_restarts: int = Field(20, ge=0, description="how often a job that was stopped, killed or lost a node goes on")
    network: Network | None = Field(None, description="settings for a kind of network: ethernet, infiniband, efa")
    interface: str = Field("", description="network interface that ranks meet on, such as ib0; by default they choose")
    container: str = Field("", description="image that jobs run in: a .sif file on SLURM, a registry's on Kubernetes")
    shared: list[Path] = Field([], description="file systems that all nodes see; run folders must lie on one of them")

    @property
    def processes(self) -> int:
        return self.gpus_per_node or 1


class SlurmCluster(RemoteCluster):
    """A site with SLURM, whose sbatch, scontrol and scancel work where jobs are submitted."""

    backend: Literal["slurm"]
    time: Time = Field(description="time limit of a job that does not say one, [D-]HH:MM:SS")
    meet_seconds: int = Field(30, gt=0, description="how long nodes wait for each other to begin, where that is slow")
    partition: str = Field("", description="by default the site's")
    account: str = Field("", description="what jobs are charged to")
    qos: str = Field("", description="quality of service")
    constraint: str = Field("", description="features that nodes must have")
    gres: str = Field("", description="how the site names a node's GPUs, such as gpu:a100:4; by default gpu:N")
    sbatch: Lines = Field([], description="further options of sbatch, such as --exclusive")
    modules: list[str] = Field([], description="environment modules to load")
    setup: Lines = Field([], description="shell lines that come before the program on every node")
    python: str = Field(sys.executable, description="Python on the nodes (in the container, if there is one)")
    launcher: Literal["srun", "torchrun"] = Field(
        "srun", description="srun starts one task a rank; torchrun starts the ranks of its node"
    )
    secrets: Path | None = Field(
        None, description="a file of NAME=VALUE lines on the shared file system, readable by its owner alone"
    )


class Volume(BaseModel):
    """Storage that pods see."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    claim: str = Field(description="name of a PersistentVolumeClaim, ReadWriteMany where a job has several nodes")
    path: str = Field(description="where it is mounted")
    read_only: bool = False


class KubernetesCluster(RemoteCluster):
    """A Kubernetes cluster, reached as kubectl reaches it."""

    backend: Literal["kubernetes"]
    time: Time | None = Field(None, description="limit of a job that does not say one, waiting included; null: none")
    kind: Literal["trainjob", "job"] = Field(
        "trainjob", description="a Kubeflow Trainer TrainJob, or a plain Indexed Job where Trainer is not installed"
    )
    context: str = Field("", description="of the kubeconfig; by default the current one")
    namespace: str = Field("default", description="where jobs are made")
    runtime: str = Field("torch-distributed", description="the ClusterTrainingRuntime that a TrainJob refers to")
    volumes: list[Volume] = Field([], description="storage; run folder and data lie there")
    secrets: dict[str, SecretEntry] = Field({}, description="variable: SECRET/KEY, the entry of a Secret that it holds")
    shared_memory_gb: int = Field(8, gt=0, description="/dev/shm, where loaders hand over batches; part of memory_gb")
    tolerations: list[dict[str, Any]] = Field([], description="taints that pods accept")
    node_selector: dict[str, str] = Field({}, description="labels that nodes must have")
    run_as: int | None = Field(None, ge=0, description="user id of pods, which may write to the volumes; null: image's")
    gpu_resource: str = Field("nvidia.com/gpu", description="how the cluster names a GPU")
    resources: dict[str, str] = Field({}, description="what else a pod needs, such as vpc.amazonaws.com/efa: 4")


AnyCluster = LocalCluster | SlurmCluster | KubernetesCluster


def load(name: str) -> AnyCluster:
    """A cluster by the name of a file in launch/clusters, or by a .yaml file of its own.

    Raises:
        LaunchError: there is none, or it says something that has no meaning.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CLUSTERS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in CLUSTERS.glob("*.yaml")))
        raise LaunchError(f"--cluster {name}: not known. Known are {known}, or give the path of a .yaml file.")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return parse(found)
    except yaml.YAMLError as error:
        raise LaunchError(f"{path}: no YAML ({str(error).splitlines()[0]}).") from error
    except ValidationError as error:
        raise LaunchError(f"{path}: {'; '.join(_told(one, found) for one in error.errors())}.") from error


def parse(values: object) -> AnyCluster:
    """What a cluster file holds.

    Raises:
        pydantic.ValidationError: some of it has no meaning.
    """
    adapter: TypeAdapter[AnyCluster] = TypeAdapter(Annotated[AnyCluster, Field(discriminator="backend")])
    return adapter.validate_python(values)


def _told(error: Any, found: Any) -> str:
    """One of pydantic's complaints, with the nearest key where one is not known."""
    where = ".".join(str(part) for part in error["loc"][1:]) or "backend"
    if error["type"] != "extra_forbidden":
        # Our own checks name what they found themselves, or leave it out since it is secret.
        value = "" if error["type"] == "value_error" else f" (found {error['input']!r})"
        return f"{where}: {error['msg'].removeprefix('Value error, ')}{value}"
    kinds: dict[str, type[Cluster]] = {
        "local": LocalCluster,
        "slurm": SlurmCluster,
        "kubernetes": KubernetesCluster,
    }
    fields = Volume.model_fields if "volumes" in error["loc"] else kinds[found["backend"]].model_fields
    near = difflib.get_close_matches(str(error["loc"][-1]), list(fields), n=1)
    return f"{where} is no key of it" + (f"; did you mean {near[0]}?" if near else f". Known are {', '.join(fields)}")
