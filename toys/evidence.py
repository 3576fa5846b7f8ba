"""A claim, what was measured of it, and what follows.

A check is a number measured once for each seed, x_1 ... x_n, of which the claim says where its mean lies: at least a,
at most b, or both. With Student's t interval I at 95% of that mean,

    holds           I lies within [a, b]
    does not hold   I lies outside of it
    inconclusive    otherwise

and a claim holds if all its checks do, and does not if one of them does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal

Verdict = Literal["holds", "does not hold", "inconclusive"]
LEVEL = 0.95


@dataclass(frozen=True)
class Check:
    """A number for each seed, and where its mean should lie; with neither bound it is only told.

    says: what the number is.
    """

    says: str
    values: Sequence[float]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def mean(self) -> float:
        return mean(self.values) if all(map(math.isfinite, self.values)) else sum(self.values)  # infinite, or NaN

    @property
    def interval(self) -> tuple[float, float]:
        """Student's t at 95%; the whole line for a single seed.

        A training that diverged is an infinite value: the interval of the others then has no end on that side. Where
        all diverged, it is infinity itself.
        """
        return _interval(self.values)

    @property
    def verdict(self) -> Verdict | None:
        """None where there is no bound."""
        if self.at_least is None and self.at_most is None:
            return None
        least = -math.inf if self.at_least is None else self.at_least
        most = math.inf if self.at_most is None else self.at_most
        low, high = self.interval
        if least <= low and high <= most:
            return "holds"
        return "does not hold" if high < least or low > most else "inconclusive"

    @property
    def bounds(self) -> str:
        """Where the mean should lie."""
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g}"
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return "" if self.at_most is None else f"≤ {self.at_most:g}"


class Ratio(Check):
    """A positive number for each seed: its mean is the geometric one, and the interval that of its logarithm."""

    @property
    def mean(self) -> float:
        return math.exp(Check("", self._logs).mean)

    @property
    def interval(self) -> tuple[float, float]:
        low, high = _interval(self._logs)
        return math.exp(low), math.exp(high)

    @property
    def _logs(self) -> list[float]:
        return [math.log(value) if value > 0 else -math.inf if value == 0 else math.nan for value in self.values]


@dataclass(frozen=True)
class Claim:
    """name: a word or two.  source: paper and place.  measure: its checks; it says the claim in the first line of its
    docstring.  because: the reason found, where it does not hold here, or not for the paper's reason."""

    name: str
    source: str
    measure: Callable[[Any], Sequence[Check]]
    because: str = ""

    @property
    def says(self) -> str:
        """The claim, in one sentence."""
        return (self.measure.__doc__ or "").partition("\n")[0]


@dataclass(frozen=True)
class Finding:
    """A claim's name, and its checks."""

    name: str
    checks: Sequence[Check]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        verdicts = [check.verdict for check in self.checks if check.verdict is not None]
        if "does not hold" in verdicts:
            return "does not hold"
        return "holds" if verdicts and all(each == "holds" for each in verdicts) else "inconclusive"

    @property
    def held(self) -> str:
        """How many of the checks that have bounds hold."""
        verdicts = [check.verdict for check in self.checks if check.verdict is not None]
        return f"{verdicts.count('holds')} of {len(verdicts)}"


def shown(value: float) -> str:
    """Three digits that count."""
    if math.isnan(value):
        return "undefined"
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _interval(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2 or any(map(math.isnan, values)):
        return -math.inf, math.inf
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < len(values):
        low, high = min(values), max(values)
        if low == high:
            return low, high
        own = _interval(finite)
        return (-math.inf if low == -math.inf else own[0]), (math.inf if high == math.inf else own[1])
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half
