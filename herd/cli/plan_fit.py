"""`herd plan fit`: a scaling law from small runs, what it says of larger ones, and a picture. No torch."""

from __future__ import annotations

import json
from pathlib import Path

import click

from herd.cli.columns import columns
from herd.cli.console import note

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd plan fit runs/30m runs/60m runs/120m runs/240m runs/480m
  herd plan fit points.jsonl --predict 8e9,1e12 --compute 1e22 --plot law.png

A line of points.jsonl: {"parameters": 1.1e8, "tokens": 2.2e9, "loss": 2.608}
"""


@click.command(epilog=EPILOG)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--predict", multiple=True, metavar="N,D", help="The loss of N parameters after D tokens (more than once)."
)
@click.option(
    "--compute", type=click.FloatRange(min=1), metavar="FLOP", help="The best N and D for that many operations."
)
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="A picture with the residuals (herd[plot])."
)
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
def command(
    runs: tuple[Path, ...], predict: tuple[str, ...], compute: float | None, plot: Path | None, as_json: bool
) -> None:
    """Fit L(N, D) = E + A / N^a + B / D^b to RUNS: folders of herd train, or files of points.

    The error that a prediction may have is measured: the law is fitted without the two largest runs and asked for them.
    """
    from herd.planning.train_fit import fit, points_of

    points = points_of(runs)
    law = fit(points)
    asked = [_pair(text) for text in predict]
    optimal = None if compute is None else law.optimal(compute)
    if as_json:
        told = {
            "schema": "herd.plan.fit/1",
            "law": law.as_dict(),
            "points": [
                {
                    "name": p.name,
                    "parameters": p.parameters,
                    "tokens": p.tokens,
                    "loss": p.loss,
                    "law": law.loss(p.parameters, p.tokens),
                }
                for p in points
            ],
            "predictions": [{"parameters": n, "tokens": d, "loss": law.loss(n, d)} for n, d in asked],
            "optimal": None
            if optimal is None
            else {"compute": compute, "parameters": optimal[0], "tokens": optimal[1]},
        }
        click.echo(json.dumps(told, indent=1))
    else:
        data = "" if law.joint else f" + {law.b:.4g} / D^{law.beta:.4f}"
        click.echo(f"L = {law.floor:.4f} + {law.a:.4g} / N^{law.alpha:.4f}{data}")
        if law.joint:
            click.echo(
                "All runs read about the same number of tokens a parameter: the law holds along that line only, and what more "
                "tokens bring cannot be told apart from what more parameters bring."
            )
        rows = [["RUN", "PARAMETERS", "TOKENS", "LOSS", "LAW", "ERROR"]]
        for p in sorted(points, key=lambda p: p.parameters * p.tokens):
            said = law.loss(p.parameters, p.tokens)
            rows.append(
                [
                    p.name,
                    f"{p.parameters:.3g}",
                    f"{p.tokens:.3g}",
                    f"{p.loss:.4f}",
                    f"{said:.4f}",
                    f"{said / p.loss - 1:+.2%}",
                ]
            )
        click.echo(columns(rows, right=range(1, 6)))
        click.echo(f"Root mean square error over the runs {law.residual:.2%}" + _spread(law.spread))
        for n, d in asked:
            click.echo(f"{n:.3g} parameters, {d:.3g} tokens: loss {law.loss(n, d):.4f}")
        if compute is not None:
            if optimal is None:
                click.echo(f"{compute:.3g} operations: these runs cannot tell the best size")
            else:
                click.echo(
                    f"{compute:.3g} operations: best spent on {optimal[0]:.3g} parameters and {optimal[1]:.3g} tokens"
                )
    if plot is not None:
        from herd.planning.train_plot import draw

        draw(points, law, asked, plot)
        note(f"written: {plot}")


def _spread(value: float | None) -> str:
    if value is None:
        return "; too few runs to say how well it predicts (7 are needed)."
    return f"; without the two largest, it misses them by {value:.2%}."


def _pair(text: str) -> tuple[float, float]:
    try:
        n, d = (float(part) for part in text.split(","))
    except ValueError:
        n = d = 0.0
    if n <= 0 or d <= 0:
        raise click.UsageError(f"--predict {text}: expected parameters and tokens, such as 8e9,1e12")
    return n, d
