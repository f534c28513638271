"""The launchers: what they would submit, and the local one for real."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import kubernetes_validate
import prometheus_client
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from brewjax.serve.config import ServeConfig
from brewjax.serve.http import OPEN_PATHS
from brewjax.serve.telemetry import Metrics
from brewjax.train.metrics_writer import METRICS, read_metrics
from tests.pipeline.test_run import BASE, MODEL, TASK
from tests.tables import write_dataset

LAUNCH = Path(__file__).parents[1] / "launch"
GKE = {"NAME": "brew", "ACCELERATOR": "tpu-v5p-slice", "TOPOLOGY": "4x4x8", "IMAGE": "brewjax:1", "BUCKET": "runs"}
SERVE = {"NAME": "ranker", "IMAGE": "brewjax:1", "CLAIM": "models", "MODEL": "demo/turbo/model", "SECRET": "token"}
XPK = {"NAME": "brew", "CLUSTER": "c", "TPU_TYPE": "v5p-128", "IMAGE": "brewjax:1", "STORAGE": "runs"}


def tool(name: str) -> str:
    """Where a program is that a test needs: beside this Python, where pip puts it, or on the PATH."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or name


def launch(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command, environment = [str(LAUNCH / script), *arguments], os.environ | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_scripts_pass_shellcheck():
    command = [tool("shellcheck"), "-x", *LAUNCH.glob("*.sh")]
    checked = subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_image_is_linted_and_has_all_that_it_installs(tmp_path):
    linted = subprocess.run([tool("hadolint"), LAUNCH / "Dockerfile"], capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            *sources, target = line.split()[1:]
            for source in sources:
                assert f"!{source}" in (LAUNCH.parent / ".dockerignore").read_text().splitlines()
                path = LAUNCH.parent / source
                shutil.copytree(path, tmp_path / target) if path.is_dir() else shutil.copy(path, tmp_path / target)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "wheels", tmp_path]
    built = subprocess.run(wheel, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (file,) = (tmp_path / "wheels").glob("brewjax-*.whl")
    inside = zipfile.ZipFile(file).namelist()
    assert {"brewjax/cli.py", "brewjax/configs/recipes/demo.yaml", "pallas_kernels/attention.py"} <= set(inside)
    modules = (path for package in ("brewjax", "pallas_kernels") for path in (LAUNCH.parent / package).rglob("*.py"))
    assert {path.relative_to(LAUNCH.parent).as_posix() for path in modules} <= set(inside)


def test_gke_submits_a_pod_for_each_host_of_the_slice():
    result = launch("gke.sh", "--dry-run", "r.yaml", "--set", 'name="a b"', **GKE)
    assert result.returncode == 0, result.stderr
    assert "${" not in result.stdout.split("\n", 1)[1]
    jobset = yaml.safe_load(result.stdout)
    assert JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset  # what the schema does not know would be dropped
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["completions"] * chips == math.prod(
        map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    )
    assert job["parallelism"] == job["completions"]
    assert container["command"] + container["args"] == ["brewjax", "run", "r.yaml", "--set", 'name="a b"']
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]  # and so 75 starts again
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert pod["serviceAccountName"] == "default"
    assert "queue" not in str(jobset)
    (volume,) = pod["volumes"]
    assert "implicit-dirs" in volume["csi"]["volumeAttributes"]["mountOptions"].split(",")


def test_servers_on_kubernetes_are_what_its_schema_and_the_server_take():
    result = launch("serve.sh", "--dry-run", **SERVE, RESOURCES="cpu: 8, memory: 64Gi, nvidia.com/gpu: 1")
    assert result.returncode == 0, result.stderr
    assert "${" not in result.stdout.split("\n", 1)[1]
    manifests = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(result.stdout)}
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    settings = ServeConfig.of(yaml.safe_load(manifests["ConfigMap"]["data"]["serve.yaml"]), "serve.yaml")
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > settings.lame_duck_seconds + settings.drain_seconds
    (container,) = pod["containers"]
    assert container["command"][:3] == ["brewjax", "serve", "/models/demo/turbo/model"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {
        "grpc": settings.port, "http": settings.http_port
    }  # fmt: skip
    assert container["resources"]["limits"] == {"cpu": 8, "memory": "64Gi", "nvidia.com/gpu": 1}
    for probe in ("startup", "readiness", "liveness"):
        assert container[f"{probe}Probe"]["httpGet"]["path"] in OPEN_PATHS
    (metric,) = manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]
    exposed = prometheus_client.generate_latest(Metrics().registry).decode()
    assert f"\n{metric['pods']['metric']['name']} 0.0" in exposed
    assert float(metric["pods"]["target"]["averageValue"]) < settings.max_queued_tokens
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


def test_gke_takes_a_service_account_a_queue_and_ephemeral_storage():
    settings = {"SERVICE_ACCOUNT": "trainer", "QUEUE": "tpus", "EPHEMERAL_STORAGE": "9Gi"}
    jobset = yaml.safe_load(launch("gke.sh", "--dry-run", "r.yaml", **GKE | settings).stdout)
    assert JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["spec"]["serviceAccountName"] == "trainer"
    assert template["metadata"]["annotations"]["gke-gcsfuse/ephemeral-storage-limit"] == "9Gi"
    assert template["spec"]["containers"][0]["resources"]["limits"]["ephemeral-storage"] == "9Gi"


@pytest.mark.parametrize(
    ("accelerator", "topology", "chips", "hosts"),
    [
        ("tpu-v6e-slice", "1x1", 1, 1),
        ("tpu-v6e-slice", "2x2", 4, 1),
        ("tpu-v6e-slice", "2x4", 8, 1),
        ("tpu-v5-lite-podslice", "16x16", 4, 64),
        ("tpu-v5p-slice", "2x2x1", 4, 1),
        ("tpu7x", "4x4x4", 4, 16),
    ],
)
def test_gke_knows_the_chips_of_a_host(accelerator, topology, chips, hosts):
    planned = launch("gke.sh", "--dry-run", "r.yaml", **GKE | {"ACCELERATOR": accelerator, "TOPOLOGY": topology})
    job = yaml.safe_load(planned.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == hosts
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


@pytest.mark.parametrize(("namespace", "code"), [("True", 0), ("", 2)])
def test_a_bucket_in_which_folders_cannot_be_renamed_is_refused(tmp_path, namespace, code):
    fake(tmp_path, "gcloud", f"echo {namespace}")
    launched = launch("gke.sh", "r.yaml", **GKE, PATH=fake(tmp_path, "kubectl", "cat"))
    assert launched.returncode == code
    assert ("gs://runs has a flat namespace" in launched.stderr) == bool(code)


def test_slurm_submits_a_process_for_each_gpu_and_queues_again_on_75():
    result = launch("slurm.sh", "--dry-run", "4", "8", "r.yaml", "--set", "name=a b")
    for line in ("#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=8", "#SBATCH --signal=TERM@120", "code == 75"):
        assert line in result.stdout
    assert "brewjax run 'r.yaml' '--set' 'name=a b'" in result.stdout
    assert subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=False).returncode == 0


def test_gcloud_runs_on_every_vm():
    result = launch("tpu_vm.sh", "--dry-run", "pod", "us-east5-a", "r.yaml")
    assert result.stdout.startswith("'gcloud' 'compute' 'tpus' 'tpu-vm' 'ssh' 'pod' '--zone=us-east5-a' '--worker=all'")
    assert "again.sh brewjax run" in result.stdout
    first, second = launch(
        "tpu_vm.sh", "--dry-run", "pod", "us-east5-a", "r.yaml", TYPE="v5p-128", VERSION="v2"
    ).stdout.splitlines()
    assert "'create' 'pod' '--zone=us-east5-a' '--accelerator-type=v5p-128' '--version=v2'" in first
    assert second == result.stdout.strip()


def test_a_dry_run_is_what_is_submitted(tmp_path):
    for script, arguments, tool in (
        ("tpu_vm.sh", ("pod", "z", "r.yaml", "--set", "name=a b"), "gcloud"),
        ("xpk.sh", ("r.yaml", "--set", "name=a b"), "xpk"),
    ):
        path = fake(tmp_path, tool, f"printf '%s\\n' {tool} \"$@\"")
        submitted = launch(script, *arguments, **XPK, PATH=path).stdout.splitlines()
        planned = shlex.split(launch(script, "--dry-run", *arguments, **XPK).stdout)
        assert submitted[: len(planned)] == planned
    for script, arguments, tool in (
        ("gke.sh", ("r.yaml", "--set", "name=a b"), "kubectl"),
        ("slurm.sh", ("2", "8", "r.yaml"), "sbatch"),
    ):
        path = fake(tmp_path, tool, "cat")
        fake(tmp_path, "gcloud", "exit 1")
        planned = launch(script, "--dry-run", *arguments, **GKE).stdout.strip()
        assert planned
        assert planned in launch(script, *arguments, **GKE, PATH=path).stdout


def test_xpk_starts_again_on_75_and_passes_sigterm_on():
    planned = shlex.split(launch("xpk.sh", "--dry-run", "r.yaml", "--set", "name=a b", **XPK).stdout)
    assert planned[:3] == ["xpk", "workload", "create"]
    assert {"--restart-on-exit-codes=75", "--max-restarts=10", "--env=BREWJAX_DISTRIBUTED=auto"} <= set(planned)
    assert planned[-1] == "--command=cd /bucket && exec brewjax run 'r.yaml' '--set' 'name=a b'"


@pytest.mark.parametrize(
    ("command", "variables", "message"),
    [
        (["local.sh", "r.yaml"], {}, "usage: launch/local.sh"),
        (["slurm.sh", "2", "r.yaml"], {}, "usage: launch/slurm.sh"),
        (["tpu_vm.sh", "pod"], {}, "usage: launch/tpu_vm.sh"),
        (["gke.sh", "r.yaml"], {"NAME": "x"}, "ACCELERATOR is not set"),
        (["xpk.sh", "r.yaml"], {"CLUSTER": "x"}, "NAME is not set"),
        (["gke.sh", "r.yaml"], GKE | {"TOPOLOGY": "v5p"}, "TOPOLOGY is 'v5p'; it looks like 4x4x4"),
        (["gke.sh", "r.yaml"], GKE | {"TOPOLOGY": "3x3x3"}, "3x3x3 has 27 chips, no multiple of the 4 of a host"),
        (["gke.sh", "r.yaml"], GKE | {"TOPOLOGY": "16x16"}, "chips of tpu-v5p-slice lie in shapes of 3 sides"),
        (["gke.sh", "r.yaml"], GKE | {"ACCELERATOR": "v5p"}, "ACCELERATOR is 'v5p'; known: tpu-v4-podslice"),
        (["gke.sh", "r.yaml"], GKE | {"NAME": "Brew_1"}, "NAME is 'Brew_1'; Kubernetes takes"),
        (["xpk.sh", "r.yaml"], XPK | {"NAME": "x" * 41}, "Kubernetes takes at most 40"),
        (["serve.sh"], {"NAME": "x"}, "IMAGE is not set"),
        (["serve.sh", "model"], {}, "'model': all settings are variables"),
        (["serve.sh"], SERVE | {"REPLICAS": "11"}, "REPLICAS is 11, more than MAX_REPLICAS, 10"),
    ],
)
def test_what_is_missing_is_said(command, variables, message):
    refused = launch(*command, **variables)
    assert refused.returncode == 2
    assert message in refused.stderr


def fake(folder: Path, name: str, body: str) -> str:
    """A PATH on which this command comes first."""
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("command", "tool", "refusal", "advice"),
    [
        (["slurm.sh", "1", "8", "r"], "sbatch", "sbatch: error: invalid partition specified: x", "SBATCH_PARTITION"),
        (["gke.sh", "r"], "kubectl", 'no matches for kind "JobSet"', "JobSet is not installed"),
        (["gke.sh", "r"], "kubectl", "Error: exceeded quota: tpu", "kubectl describe quota"),
        (["tpu_vm.sh", "pod", "z", "r"], "gcloud", "ERROR: NOT_FOUND: nodes/pod", "No TPU 'pod' in z"),
        (["tpu_vm.sh", "pod", "z", "r"], "gcloud", "RESOURCE_EXHAUSTED: Quota exceeded", "Quota is used up"),
        (["tpu_vm.sh", "pod", "z", "r"], "gcloud", "There is no more capacity in the zone", "No capacity in z"),
        (["tpu_vm.sh", "pod", "z", "r"], "gcloud", "INVALID_ARGUMENT: acceleratorType", "Wrong TYPE"),
        (["tpu_vm.sh", "pod", "z", "r"], "gcloud", "ls: Transport endpoint is not connected", "bucket is not mounted"),
        (["xpk.sh", "r"], "xpk", "API exception while getting Storage runs: (404)", "STORAGE is not attached"),
        (["xpk.sh", "r"], "xpk", "v5p-128 is not present on the cluster c", "TPU_TYPE or SLICES"),
    ],
)
def test_a_refusal_comes_with_advice(tmp_path, command, tool, refusal, advice):
    fake(tmp_path, "gcloud", "exit 1")  # not one that this machine may have
    refused = launch(*command, **GKE | XPK, PATH=fake(tmp_path, tool, f"echo '{refusal}' >&2; exit 1"))
    assert refused.returncode
    assert advice in refused.stderr


@pytest.mark.parametrize(("code", "runs"), [(0, 1), (2, 1), (75, 3), (137, 3)])
def test_again_restarts_what_asks_for_it(tmp_path, code, runs):
    path = fake(tmp_path, "work", f"echo run >> {tmp_path}/runs; exit {code}")
    assert launch("again.sh", "work", PATH=path, RESTARTS="2").returncode == code
    assert len((tmp_path / "runs").read_text().splitlines()) == runs


@pytest.mark.long
def test_a_recipe_on_two_local_processes_survives_the_loss_of_one(tmp_path):
    write_dataset(tmp_path / "jobs")
    recipe = BASE.replace("mesh: {data: 1}", "num_data_shards: 2").replace("steps: 4", "steps: 60")
    recipe += "stages: {big: {do: sft}, small: {do: prune, d_ff: 0.5}, turbo: {do: quantize}}\n"
    for name, text in {"apply": TASK, "model": MODEL, "recipe": recipe}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": fake(tmp_path, "brewjax", f'echo $$ > "$JAX_PROCESS_ID.pid"; exec {sys.executable} -m brewjax "$@"'),
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(LAUNCH.parent),
        "PORT": str(port),
    }
    launched = subprocess.Popen([LAUNCH / "local.sh", "2", "recipe.yaml"], cwd=tmp_path, env=environment)
    metrics = tmp_path / "runs/jobs/big" / METRICS
    while len(read_metrics(metrics)) < 10:
        assert launched.poll() is None, (tmp_path / "logs/process-0.log").read_text()
        time.sleep(0.01)
    os.kill(int((tmp_path / "1.pid").read_text()), 9)
    assert launched.wait() == 0
    for number in (0, 1):
        assert "restart 1 of at most 10" in (tmp_path / f"logs/process-{number}.log").read_text()
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, 61))
    assert (tmp_path / "runs/jobs/report/report.html").exists()
