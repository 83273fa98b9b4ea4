"""A quality report as a picture: the error behind every layer, and of every kind of matrix. matplotlib is needed here only."""

from __future__ import annotations

from pathlib import Path

from herd.convert.lost import Quality

__all__ = ["plot_quality"]

TOTAL, ALONE, WEIGHTS = "#1f6f8b", "#c96f2c", "#8a8a8a"


def plot_quality(quality: Quality, file: Path, title: str) -> None:
    """Draw into `file` (.png, .svg or .pdf)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    layers = quality.layers[1:]
    places = range(len(layers))
    weights = quality.by_layer
    left.plot(
        places, [100 * layer.total for layer in layers], color=TOTAL, marker="o", label="output, all before it included"
    )
    left.plot(
        places, [100 * (layer.alone or 0.0) for layer in layers], color=ALONE, marker="o", label="output, by itself"
    )
    left.plot(
        places, [100 * weights.get(layer.name, 0.0) for layer in layers], color=WEIGHTS, marker=".", label="weights"
    )
    left.set_xlabel("layer")
    left.set_ylabel("relative error")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    kinds = quality.kinds
    names = [f"{kind}\n{stored}, {bits:.2f} bits" for kind, (_, bits, stored) in kinds.items()]
    bars = right.barh(range(len(kinds)), [100 * error for error, _, _ in kinds.values()], color=WEIGHTS)
    right.bar_label(bars, [f"{error:.2%}" for error, _, _ in kinds.values()], padding=2, fontsize=8)
    right.set_yticks(range(len(kinds)), names, fontsize=7)
    right.invert_yaxis()
    right.margins(x=0.2)
    right.set_xlabel("relative error of the weights")
    for axis in (left.yaxis, right.xaxis):
        axis.set_major_formatter(PercentFormatter(decimals=None))
    kl = quality.kl
    figure.suptitle(
        f"{title}\nperplexity {quality.a.value:.4g} to {quality.b.value:.4g}, KL mean {kl.mean:.3g}, 99 % {kl.p99:.3g} nats, "
        f"same first choice {quality.same_top:.1%}",
        fontsize=9,
    )
    figure.savefig(file, dpi=150)
