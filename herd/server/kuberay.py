"""The manifest with which KubeRay runs copies of the server on Kubernetes. No torch, no Ray."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from herd.errors import ConfigError
from herd.server.cluster import NAME, as_json, check_replicas
from herd.server.settings import ServerSettings

__all__ = ["RAY", "kuberay", "service"]

RAY = "2.60.0"
"""The version of Ray that the tests run; the image must have the same."""
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
    return "\n".join([*head, *_yaml(service(settings, replicas, image)), ""])


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
            "serveConfigV2": "\n".join(_yaml(serving)) + "\n",
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


def _yaml(value: Any, indent: str = "") -> Iterator[str]:
    """Lines of YAML: mappings and lists as blocks, texts of whole lines as they are, the rest as JSON, which YAML reads."""
    pairs = value.items() if isinstance(value, Mapping) else ((None, item) for item in value)
    for key, item in pairs:
        lead = f"{indent}-" if key is None else f"{indent}{key if _plain(key) else _scalar(key)}:"
        if isinstance(item, str) and re.fullmatch(r"(\w[^\r\t]*\n)+", item) and not item.endswith("\n\n"):
            yield f"{lead} |"
            yield from (f"{indent}  {line}" for line in item[:-1].split("\n"))
        elif isinstance(item, Mapping | list | tuple) and item:
            lines = list(_yaml(item, indent + "  "))
            if key is None:
                yield f"{lead} {lines[0].lstrip()}"
                yield from lines[1:]
            else:
                yield lead
                yield from lines
        else:
            yield f"{lead} {_scalar(item)}"


def _plain(key: str) -> bool:
    words = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    return re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_-]*", key) is not None and key.lower() not in words


def _scalar(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # YAML 1.1 takes 1e-05 for a text.
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text
