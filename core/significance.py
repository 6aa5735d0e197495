"""What an experiment's numbers say: rates and means with their confidence intervals, and each variant against
the control. The tests are SciPy's; api.experiments is the user.

Levels are 95 %. A p-value is of one comparison; `p_adjusted` is Bonferroni's, for as many variants as are
compared with the control on that metric. Metrics are not corrected for each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from core.experiments import Metric

LEVEL = 0.95


class Interval(BaseModel):
    low: float
    high: float


class Estimate(BaseModel):
    """Of one variant: `n` subjects, their mean (of a boolean: the rate of true), and its 95 % interval: Wilson's
    for a rate, Student's for a mean; None where there are too few."""

    n: int
    mean: float | None
    interval: Interval | None
    true: int | None = None
    standard_deviation: float | None = None


class Comparison(BaseModel):
    """A variant less the control. The interval is Newcombe's (1998, method 10) for rates, Welch's for means."""

    variant: str
    difference: float | None
    interval: Interval | None
    test: str
    p: float | None
    p_adjusted: float | None


class Result(BaseModel):
    """Of one metric: an estimate for each variant, and the others against the first."""

    metric: str
    kind: str
    estimates: dict[str, Estimate]
    comparisons: list[Comparison]
    corrected_for: int


def result(metric: Metric, values: dict[str, list[float]]) -> Result:
    """A metric's result; `values` has each variant's, the control's first."""
    boolean = metric.kind == "boolean"
    (_, control), *others = values.items()
    compare = _rates if boolean else _means
    comparisons = [compare(name, control, theirs) for name, theirs in others]
    for each in comparisons:
        if each.p is not None:
            each.p_adjusted = min(1.0, each.p * len(others))
    estimates = {name: (_rate if boolean else _mean)(theirs) for name, theirs in values.items()}
    return Result(metric=metric.name, kind=metric.kind, estimates=estimates, comparisons=comparisons, corrected_for=len(others))


def sample_ratio_p(subjects: Sequence[int], weights: Sequence[float]) -> float | None:
    """How likely the variants' numbers of subjects are by their weights (chi-square test); a very small p
    says that the assigning or the counting went wrong, and the results with it."""
    if sum(subjects) == 0:
        return None
    share = sum(subjects) / sum(weights)
    return _number(_stats().chisquare(subjects, [w * share for w in weights]).pvalue)


def _rate(values: list[float]) -> Estimate:
    n, true = len(values), sum(v != 0 for v in values)
    if not n:
        return Estimate(n=0, mean=None, interval=None, true=0)
    found = _stats().binomtest(true, n).proportion_ci(LEVEL, method="wilson")
    return Estimate(n=n, mean=true / n, interval=Interval(low=found.low, high=found.high), true=true)


def _mean(values: list[float]) -> Estimate:
    n = len(values)
    if not n:
        return Estimate(n=0, mean=None, interval=None)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(n=n, mean=mean, interval=None)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(_stats().t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)
    return Estimate(n=n, mean=mean, interval=Interval(low=mean - half, high=mean + half), standard_deviation=deviation)


def _rates(name: str, control: list[float], theirs: list[float]) -> Comparison:
    """Chi-square without continuity correction; Fisher's exact test where an expected count is below five."""
    a, b = _rate(control), _rate(theirs)
    if not (a.n and b.n and a.interval and b.interval and a.mean is not None and b.mean is not None and a.true is not None and b.true is not None):
        return Comparison(variant=name, difference=None, interval=None, test="none: too few", p=None, p_adjusted=None)
    stats, difference = _stats(), b.mean - a.mean
    interval = Interval(
        low=difference - math.hypot(b.mean - b.interval.low, a.interval.high - a.mean),
        high=difference + math.hypot(b.interval.high - b.mean, a.mean - a.interval.low),
    )
    table = [[a.true, a.n - a.true], [b.true, b.n - b.true]]
    all_alike = 0 in (a.true + b.true, a.n + b.n - a.true - b.true)
    if all_alike or stats.contingency.expected_freq(table).min() < 5:
        test, p = "Fisher's exact", stats.fisher_exact(table).pvalue
    else:
        test, p = "chi-square", stats.chi2_contingency(table, correction=False).pvalue
    return Comparison(variant=name, difference=difference, interval=interval, test=test, p=_number(p), p_adjusted=None)


def _means(name: str, control: list[float], theirs: list[float]) -> Comparison:
    """Welch's t-test: the variances may differ."""
    if min(len(control), len(theirs)) < 2:
        return Comparison(variant=name, difference=None, interval=None, test="none: too few", p=None, p_adjusted=None)
    difference = math.fsum(theirs) / len(theirs) - math.fsum(control) / len(control)
    if len(set(control)) == len(set(theirs)) == 1:
        return Comparison(variant=name, difference=difference, interval=None, test="none: no variance", p=None, p_adjusted=None)
    found = _stats().ttest_ind(theirs, control, equal_var=False)
    low, high = found.confidence_interval(LEVEL)
    return Comparison(variant=name, difference=difference, interval=Interval(low=low, high=high), test="Welch's t", p=_number(found.pvalue), p_adjusted=None)


def _number(value: Any) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def _stats() -> Any:
    """scipy.stats takes a second to import, which the start of the service need not wait for."""
    from scipy import stats

    return stats
