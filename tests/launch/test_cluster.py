"""Cluster files: what they may say, and what is told of those that say something else."""

from __future__ import annotations

import pytest

from launch import cluster
from launch.job import LaunchError, seconds

SLURM = "backend: slurm\ntime: 24:00:00\n"


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "site.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("path", sorted(cluster.CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_that_come_along_are_whole_and_come_back_from_what_is_recorded(path):
    found = cluster.load(path.stem)
    assert cluster.parse(found.model_dump(mode="json")) == found


def test_times_need_no_quotes_and_numbers_may_be_variables(written):
    found = cluster.load(written(SLURM + "environment: {NCCL_IB_TIMEOUT: 22}\n"))
    assert seconds(found.time) == 86_400
    assert found.environment == {"NCCL_IB_TIMEOUT": "22"}
    assert seconds(cluster.load(written("backend: slurm\ntime: 2-01:00:00\n")).time) == 49 * 3600


def test_what_names_a_secret_or_sounds_like_one_is_none(written):
    setup = 'export HF_TOKEN_PATH=/home/me/token HF_TOKEN="$(cat ~/token)" TOKENIZERS_PARALLELISM=false'
    text = f"{SLURM}environment: {{TOKENIZERS_PARALLELISM: 'false'}}\nsetup: ['{setup}']\n"
    assert cluster.load(written(text)).setup == [setup]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SLURM + "partitoin: gpu\n", "partitoin is no key of it; did you mean partition?"),
        (SLURM + "network: infiniband2\n", "network: .*infiniband"),
        ("backend: slurm\ntime: 1h\n", "D-.HH:MM:SS"),
        ("backend: slurm\n", "time: Field required"),
        ("backend: pbs\n", "backend: .*'pbs'.*'local', 'slurm', 'kubernetes'"),
        ("- a\n", r"backend: .*valid dict.*\['a'\]"),
        ("a: [\n", "no YAML"),
        (SLURM + "environment: {WANDB_API_KEY: abc}\n", "looks like a secret"),
        (SLURM + "setup: ['umask 7; export WANDB_API_KEY=abc']\n", "setup: WANDB_API_KEY looks like a secret"),
        (SLURM + "sbatch: ['--export=A=1,HF_TOKEN=abc']\n", "sbatch: HF_TOKEN looks like a secret"),
        (SLURM + "environment: {HTTPS_PROXY: 'http://me:abc@proxy'}\n", "HTTPS_PROXY looks like a secret"),
        (SLURM + "setup: ['export https_proxy=http://me:abc@proxy']\n", "setup: an address with a password"),
        ("backend: kubernetes\ntime: 1:00:00\nvolumes: [{claims: x, path: /y}]\n", "did you mean claim?"),
    ],
)
def test_mistakes_are_named_with_the_fix(written, text, message):
    with pytest.raises(LaunchError, match=message) as caught:
        cluster.load(written(text))
    assert "abc" not in str(caught.value)
