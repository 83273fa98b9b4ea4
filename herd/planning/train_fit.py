"""A scaling law from small runs: L(N, D) = E + A / N^a + B / D^b, and what it says of larger ones. numpy, no torch.

Fitted as Hoffmann et al. (2022, approach 3) do: the logarithm of the loss, Huber's measure, many starts. With runs along one line
only (tokens a fixed multiple of parameters) the two terms cannot be told apart: then one power of N is fitted and said so.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from herd.errors import ConfigError

__all__ = ["Law", "Point", "fit", "points_of"]

DELTA = 1e-3
"""Where Huber's measure becomes linear, in log loss."""
ALIKE = 0.1
"""Spread of logarithms below which numbers of runs count as one and the same."""
FEWEST = 5
STEPS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run: trained parameters (counted alike in all), tokens read, final held-out loss in nats a token."""

    parameters: float
    tokens: float
    loss: float
    name: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """L(N, D) = floor + a / N^alpha + b / D^beta. `joint`: D was a multiple of N in all runs, so `b` is 0 and N stands for both.

    `residual` is the root mean square of the relative error over the points, `spread` that of the two largest runs when the law
    is fitted without them (None with too few): what to expect of a prediction.
    """

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    joint: bool
    residual: float
    spread: float | None

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss that the law predicts."""
        data = self.b / tokens**self.beta if self.b else 0.0
        return self.floor + self.a / parameters**self.alpha + data

    def optimal(self, compute: float) -> tuple[float, float] | None:
        """(parameters, tokens) with the least loss for `compute` = 6 N D operations; None where runs cannot tell."""
        if self.joint:
            return None
        ratio = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * (compute / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, compute / 6 / parameters

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def fit(points: Sequence[Point]) -> Law:
    """The law of `points`. Raises ConfigError for fewer than five, or numbers that are no runs."""
    if len(points) < FEWEST:
        raise ConfigError(f"{len(points)} runs: a law needs at least {FEWEST}, of several sizes and numbers of tokens")
    for point in points:
        if not all(math.isfinite(v) and v > 0 for v in (point.parameters, point.tokens, point.loss)):
            raise ConfigError(f"run {point.name or point}: parameters, tokens and loss must be positive numbers")
    law = _fit(points)
    spread = None
    rest = sorted(points, key=lambda p: p.parameters * p.tokens)[:-2]
    if len(rest) >= FEWEST:
        last = [point for point in points if point not in rest]
        with contextlib.suppress(ConfigError):  # the rest alone is of one size, or one number of tokens
            spread = _relative(_fit(rest), last)
    return Law(**{**law.as_dict(), "spread": spread})


def _fit(points: Sequence[Point]) -> Law:
    n, d, loss = (np.array([getattr(p, key) for p in points]) for key in ("parameters", "tokens", "loss"))
    joint = float(np.std(np.log(d / n))) < ALIKE
    if len(set(n)) < 2:
        raise ConfigError("all runs have the same number of parameters: a law needs several sizes")
    if float(np.std(np.log(d))) < ALIKE:
        raise ConfigError(
            "all runs read about the same number of tokens, so nothing says what more of them bring: add runs of other budgets, "
            "or let tokens grow with parameters"
        )
    middle_n, middle_d = math.exp(float(np.mean(np.log(n)))), math.exp(float(np.mean(np.log(d))))
    x, y, z = np.log(n / middle_n), np.log(d / middle_d), np.log(loss)
    best: tuple[float, np.ndarray] | None = None
    low = math.log(float(loss.min()))
    starts = (
        product((0.3, 0.6, 0.9), (0.2, 0.5), (0.2, 0.5)) if not joint else product((0.2, 0.5, 0.8), (0.1, 0.3), (0.3,))
    )
    for share, alpha, beta in starts:
        rest = math.log(float(loss.mean()) * (1 - share) / (1 if joint else 2))
        start = np.array([low + math.log(share), rest, alpha, *([] if joint else [rest, beta])])
        value, found = _descend(start, x, y, z)
        if best is None or value < best[0]:
            best = value, found
    assert best is not None
    e, a, alpha, *more = best[1]
    law = Law(
        floor=math.exp(e),
        a=math.exp(a) * middle_n**alpha,
        alpha=float(alpha),
        b=0.0 if joint else math.exp(more[0]) * middle_d ** more[1],
        beta=0.0 if joint else float(more[1]),
        joint=joint,
        residual=0.0,
        spread=None,
    )
    return Law(**{**law.as_dict(), "residual": _relative(law, points)})


def _descend(at: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[float, np.ndarray]:
    """Levenberg and Marquardt's method with Huber's weights. Parameters: log E, log A, alpha, and log B, beta."""
    damping = 1e-3
    value, residual, slopes = _measure(at, x, y, z)
    for _ in range(STEPS):
        weight = np.minimum(1.0, DELTA / np.maximum(np.abs(residual), 1e-30))
        normal = slopes.T @ (slopes * weight[:, None])
        step = np.linalg.solve(
            normal + damping * (np.diag(np.diag(normal)) + 1e-12 * np.eye(len(at))), slopes.T @ (weight * residual)
        )
        trial = at - step
        if not np.all(np.abs(trial) < 50) or trial[2] <= 0 or (len(trial) > 3 and trial[4] <= 0):
            damping *= 10
        else:
            new, new_residual, new_slopes = _measure(trial, x, y, z)
            if new < value:
                done = value - new < 1e-14
                at, value, residual, slopes, damping = trial, new, new_residual, new_slopes, max(damping / 5, 1e-12)
                if done:
                    break
            else:
                damping *= 5
        if damping > 1e12:
            break
    return value, at


def _measure(at: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    e, a, alpha = at[:3]
    terms = [np.full_like(x, e), a - alpha * x]
    if len(at) > 3:
        terms.append(at[3] - at[4] * y)
    stacked = np.stack(terms)
    top = stacked.max(0)
    total = top + np.log(np.exp(stacked - top).sum(0))
    shares = np.exp(stacked - total)
    columns = [shares[0], shares[1], -shares[1] * x]
    if len(at) > 3:
        columns += [shares[2], -shares[2] * y]
    residual = total - z
    size = np.abs(residual)
    value = float(np.where(size <= DELTA, residual**2 / 2, DELTA * (size - DELTA / 2)).sum())
    return value, residual, np.stack(columns, 1)


def _relative(law: Law, points: Sequence[Point]) -> float:
    errors = [law.loss(p.parameters, p.tokens) / p.loss - 1 for p in points]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def points_of(paths: Sequence[str | Path]) -> list[Point]:
    """Runs as points: a folder of `herd train` (its log), or a JSON-lines file of {"parameters", "tokens", "loss"}.

    Raises ConfigError naming the file and what it lacks.
    """
    found = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            found.append(_of_run(path))
        elif path.is_file():
            for number, line in enumerate(_lines(path), 1):
                if line.strip():
                    found.append(_of_line(line, f"{path}:{number}"))
        else:
            raise ConfigError(f"{path}: no such run or file")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as lines of JSON: {error}") from error


def _of_line(line: str, where: str) -> Point:
    try:
        row = json.loads(line)
        return Point(
            parameters=float(row["parameters"]),
            tokens=float(row["tokens"]),
            loss=float(row["loss"]),
            name=str(row.get("name", where)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{where}: expected {{"parameters": N, "tokens": D, "loss": L}} ({error})') from error


def _of_run(folder: Path) -> Point:
    """The last held-out loss of a finished run's log.jsonl: before its end, the learning rate has not come down."""
    log = folder / "log.jsonl"
    if not log.is_file():
        raise ConfigError(f"{folder}: there is no log.jsonl: is it the folder of a run?")
    parameters = tokens = loss = event = None
    for line in _lines(log):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a run that was killed may leave half a line
        if not isinstance(row, dict):
            continue
        event = row.get("event")
        parameters = row.get("parameters", parameters)
        tokens = row.get("all_tokens", tokens)
        figures = row.get("figures")
        loss = figures.get("loss", loss) if isinstance(figures, dict) else loss
    if parameters is None or tokens is None or loss is None:
        raise ConfigError(
            f"{log}: has no parameters, tokens or held-out loss: give data.held_out and train.evaluate in the config"
        )
    if event != "end":
        raise ConfigError(
            f"{folder}: this run is not over, so its loss is not that of its budget: herd train {folder} goes on"
        )
    return Point(parameters=float(parameters), tokens=float(tokens), loss=float(loss), name=folder.name)
