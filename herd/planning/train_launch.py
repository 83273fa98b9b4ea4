"""Files that start a run on many machines: a Slurm batch script, and a RayJob for KubeRay. No torch, no Ray.

Both run one process a GPU. Slurm's ranks find each other through the first node; Ray's head starts torchrun on every node.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from herd.errors import ConfigError
from herd.planning.manifest import RAY, yaml_lines
from herd.planning.train_layout import Layout

__all__ = ["kuberay", "overrides", "slurm"]

PORT = 29_500
VOLUME = "/data"
"""Where the volume of a RayJob is mounted."""


def overrides(layout: Layout) -> list[str]:
    """The words that make `herd train CONFIG ...` use a planned layout, whatever CONFIG had in its place."""
    part = layout.part
    spread = {field.name: getattr(part, field.name) for field in fields(part)}
    kind = {"none": "none", "half": "2", "full": "full"}[layout.checkpointing]
    return [
        *(f"parallel.{name}={str(value).lower()}" for name, value in spread.items()),
        f"train.accumulate={layout.microbatches}",
        f"data.rows={layout.rows}",
        f"data.length={layout.length}",
        f"train.checkpointing={kind}",
        f"train.precision={layout.precision}",
        "train.compile=true",
    ]


def slurm(config: str, words: Sequence[str], *, gpus: int, node: int = 8, name: str = "herd") -> str:
    """A batch script: `sbatch FILE`. A run that is told to stop saves itself, and the script queues it again.

    Raises ConfigError when `gpus` do not fill nodes.
    """
    nodes, each = _nodes(gpus, node)
    line = shlex.join(["herd", "train", config, *words, "--resume", "auto"])
    return f"""#!/bin/bash
# Made by herd plan train. Add what your cluster asks for (--partition, --account, --time), then: sbatch FILE
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={each}
#SBATCH --gpus-per-node={each}
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

# Where the ranks meet: the first node. herd reads its rank from SLURM_PROCID.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT={PORT} OMP_NUM_THREADS=8

# Five minutes before the end every rank gets SIGUSR1, saves and ends with status 75: then the job is queued again.
trap 'kill -USR1 "$ranks"' USR1 TERM
# --wait=0: a cluster's WaitTime would end rank 0, which may be writing the result, when other ranks have left.
srun --kill-on-bad-exit=1 --wait=0 {line} &
ranks=$!
status=0
wait "$ranks" || status=$?
while kill -0 "$ranks" 2>/dev/null; do
  status=0
  wait "$ranks" || status=$?
done
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def kuberay(
    config: str, words: Sequence[str], *, gpus: int, image: str, node: int = 8, name: str = "herd-train"
) -> str:
    """A RayJob as YAML: `kubectl create -f FILE`. Raises ConfigError when `gpus` do not fill nodes."""
    nodes, each = _nodes(gpus, node)
    head = [
        "# Made by herd plan train. Edit image, sizes and the volume first, then: kubectl create -f FILE",
        f"# The image must have herd and Ray {RAY}. {config}, data and the run's folder lie on the volume {VOLUME}, where",
        "# processes start.",
    ]
    return "\n".join([*head, *yaml_lines(_job(config, words, nodes, each, image, name)), ""])


def _job(config: str, words: Sequence[str], nodes: int, each: int, image: str, name: str) -> dict[str, Any]:
    run = shlex.join(["herd", "train", config, *words, "--resume", "auto"])
    torchrun = (
        f"torchrun --nnodes={nodes} --nproc-per-node={each} --rdzv-backend=c10d "
        f"--rdzv-endpoint=$RAY_NODE_0:{PORT} --rdzv-id={name} --no-python {run}"
    )
    start = "\n".join(
        [
            "import os, ray",
            "from ray.util.placement_group import placement_group",
            "from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as At",
            "ray.init()",
            f"group = placement_group([{{'GPU': {each}, 'CPU': 8}}] * {nodes}, strategy='STRICT_SPREAD')",
            "ray.get(group.ready())",
            "def place(i):",
            f"    return dict(num_gpus={each}, num_cpus=8, scheduling_strategy=At(group, placement_group_bundle_index=i))",
            "@ray.remote(max_retries=0)",
            "def address():",
            "    return ray.util.get_node_ip_address()",
            "@ray.remote(max_retries=0)",
            "def node(first):",
            "    import subprocess",
            "    return subprocess.call(os.environ['HERD_RUN'], shell=True, env={**os.environ, 'RAY_NODE_0': first})",
            "first = ray.get(address.options(**place(0)).remote())",
            f"statuses = ray.get([node.options(**place(i)).remote(first) for i in range({nodes})])",
            "raise SystemExit(max(statuses))",
            "",
        ]
    )
    size = {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": str(each)}
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": f"{name}-data"}}]
    memory = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}}
    environment = [{"name": "HERD_RUN", "value": torchrun}]

    def container(own: str, share: dict[str, str], *more: dict[str, str]) -> dict[str, Any]:
        return {
            "name": own,
            "image": image,
            "workingDir": VOLUME,
            "env": environment,
            "resources": {"requests": share, "limits": share},
            "volumeMounts": [{"name": "data", "mountPath": VOLUME}, *more],
        }

    worker = container("ray-worker", size, {"name": "shm", "mountPath": "/dev/shm"})
    first = container("ray-head", {"cpu": "4", "memory": "16Gi"})
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": f"python -c {shlex.quote(start)}",
            "shutdownAfterJobFinishes": True,
            "backoffLimit": 3,
            "rayClusterSpec": {
                "rayVersion": RAY,
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": {"spec": {"containers": [first], "volumes": volumes}},
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "gpus",
                        "replicas": nodes,
                        "minReplicas": nodes,
                        "maxReplicas": nodes,
                        "rayStartParams": {},
                        "template": {"spec": {"containers": [worker], "volumes": [*volumes, memory]}},
                    }
                ],
            },
        },
    }


def _nodes(gpus: int, node: int) -> tuple[int, int]:
    if gpus <= node:
        return 1, gpus
    if gpus % node:
        raise ConfigError(f"{gpus} GPUs do not fill nodes of {node}: choose a multiple")
    return gpus // node, node
