"""A scaling law as a picture: losses over operations, and below, by how much the law misses each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from herd.errors import ConfigError
from herd.planning.train_fit import Law, Point

__all__ = ["draw"]


def draw(points: Sequence[Point], law: Law, asked: Sequence[tuple[float, float]], path: Path) -> None:
    """Write the picture to `path` (its ending says the format). Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'herd[plot]'") from error
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    ratios = sorted({round(p.tokens / p.parameters) for p in points})
    done = [6 * p.parameters * p.tokens for p in points]
    ends = [*done, *(6 * n * d for n, d in asked)]
    grid = [min(ends) * (max(ends) / min(ends)) ** (i / 99) for i in range(100)]
    for ratio in ratios if len(ratios) <= 4 else (ratios[0], ratios[len(ratios) // 2], ratios[-1]):
        line = [law.loss((c / 6 / ratio) ** 0.5, (c / 6 * ratio) ** 0.5) for c in grid]
        above.plot(grid, line, linewidth=1, label=f"law, {ratio:g} tokens a parameter")
    above.scatter(done, [p.loss for p in points], color="black", s=18, zorder=3, label="runs")
    if asked:
        above.scatter(
            [6 * n * d for n, d in asked],
            [law.loss(n, d) for n, d in asked],
            marker="x",
            color="crimson",
            label="predicted",
        )
    above.set(
        xscale="log", ylabel="held-out loss, nats a token", title=f"floor {law.floor:.3f}, error {law.residual:.2%}"
    )
    above.legend(fontsize=8)
    above.grid(alpha=0.3)
    below.axhline(0, color="grey", linewidth=0.8)
    below.scatter(done, [100 * (law.loss(p.parameters, p.tokens) / p.loss - 1) for p in points], color="black", s=18)
    below.set(xscale="log", xlabel="operations, 6 N D", ylabel="law - run, %")
    below.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the picture cannot be written: {error}") from error
