"""The files of `herd plan train` that start a run: written, and held against the configuration that they name. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.cli.console import note

if TYPE_CHECKING:
    from herd.planning.train import TrainPlan

__all__ = ["write"]


def write(plan: TrainPlan, slurm: Path | None, kuberay: Path | None, config: str, image: str) -> None:
    """Write what is asked for, and say what the configuration has other than was planned. Raises ConfigError."""
    from herd.errors import ConfigError
    from herd.planning import train_launch

    if not plan.fits:
        raise ConfigError("no layout fits, so there is nothing to start: see the table")
    words = train_launch.overrides(plan.fits[0].layout)
    here = Path(config).is_file()
    if here:
        _compare(plan, config, words)
    node = plan.cluster.node
    for path, text in (
        (slurm, lambda: train_launch.slurm(config, words, gpus=plan.gpus, node=node)),
        (kuberay, lambda: train_launch.kuberay(config, words, gpus=plan.gpus, image=image, node=node)),
    ):
        if path is not None:
            try:
                path.write_text(text(), encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
            note(f"written: {path}")
    if not here:
        note(
            f"herd train {config} is what is started, and there is no {config} here, so nothing was compared with it: "
            "--config names another; herd recipes cp pretrain FILE writes one to fill in",
            "yellow",
        )


def _compare(plan: TrainPlan, file: str, words: list[str]) -> None:
    """Say what `file` has other than was planned. Raises ConfigError when herd train would not take it with `words`."""
    from herd.errors import ConfigError, HerdError
    from herd.planning.subject import subject
    from herd.train.overrides import load_config

    config = load_config(file, words)
    own: Any = config.model.shape
    if not isinstance(own, dict):
        name = str(config.model.source or own)
        try:
            found = subject(name).config
            if found is None:
                raise ConfigError(f"{name}: its geometry was never published")
        except HerdError as error:
            note(f"{file} was not compared with what was planned: {error}", "yellow")
            return
        own = {"dim": found.dim, "n_layers": found.n_layers}
    if (own.get("dim"), own.get("n_layers")) != (plan.config.dim, plan.config.n_layers):
        note(
            f"{file} trains another model: dim {own.get('dim')}, {own.get('n_layers')} layers; planned were dim "
            f"{plan.config.dim}, {plan.config.n_layers} layers",
            "yellow",
        )
    if config.train.optim.kind != "adamw":
        note(f"AdamW was planned, and {file} trains with {config.train.optim.kind}", "yellow")
