"""The manifest with which KubeRay runs copies of the server on Kubernetes. No torch, no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from herd.errors import ConfigError
from herd.planning.manifest import RAY, yaml_lines
from herd.server.cluster import NAME, as_json, check_replicas
from herd.server.settings import ServerSettings

__all__ = ["kuberay", "service"]

PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": 8000}
CORES = 4
"""Of a copy; a manifest is meant to be edited."""


def kuberay(settings: ServerSettings, replicas: int, image: str) -> str:
    """A RayService as YAML. Raises ConfigError for what copies cannot honour, and for models that only this machine has."""
    check_replicas(settings)
    for spec in settings.models:
        if Path(spec.source).expanduser().exists():
            raise ConfigError(
                f"{spec.source} is on this machine, and the cluster does not see it: name a model that can be pulled, or a path "
                "inside the image that does not exist here"
            )
    head = [
        "# Made by herd serve --print-kuberay. Apply it with kubectl where KubeRay runs; edit the sizes first.",
        f"# The image must have herd[ray] with Ray {RAY}, and the models or a way to them (HF_HOME on a volume).",
        f"# API keys: kubectl create secret generic {NAME}-keys --from-literal=keys='KEY KEY'",
    ]
    return "\n".join([*head, *yaml_lines(service(settings, replicas, image)), ""])


def service(settings: ServerSettings, replicas: int, image: str) -> dict[str, Any]:
    """The manifest as plain data."""
    gpus = settings.engine.tensor_parallel if settings.engine.device.startswith("cuda") else 0  # a GPU for each rank
    serving = {
        "applications": [
            {
                "name": NAME,
                "import_path": "herd.server.cluster:application",
                "route_prefix": "/",
                "args": {**as_json(settings), "replicas": replicas, "cpus": CORES, "gpus": gpus},
            }
        ]
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME},
        "spec": {
            "serveConfigV2": "\n".join(yaml_lines(serving)) + "\n",
            "rayClusterConfig": {
                "rayVersion": RAY,
                "headGroupSpec": {
                    "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
                    "template": {"spec": {"containers": [_container("ray-head", image, 2, 0, ports=True)]}},
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "models",
                        "replicas": replicas,
                        "minReplicas": replicas,
                        "maxReplicas": replicas,
                        "rayStartParams": {},
                        "template": {"spec": {"containers": [_container("ray-worker", image, CORES, gpus)]}},
                    }
                ],
            },
        },
    }


def _container(name: str, image: str, cores: int, gpus: int, *, ports: bool = False) -> dict[str, Any]:
    size = {"cpu": str(cores), "memory": "16Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    keys = {"secretKeyRef": {"name": f"{NAME}-keys", "key": "keys", "optional": True}}
    made: dict[str, Any] = {
        "name": name,
        "image": image,
        "env": [{"name": "HERD_API_KEY", "valueFrom": keys}],
        "resources": {"requests": size, "limits": size},
    }
    if ports:
        made["ports"] = [{"containerPort": number, "name": port} for port, number in PORTS.items()]
    return made
