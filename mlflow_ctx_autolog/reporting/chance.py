"""Whether two jobs differ by more than chance: the tests of a comparison, with scipy.

The question is always the same: if both jobs had drawn their calls from one lot, how often would
they differ at least as much as they do?
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Spread", "exceeds", "holm", "means", "quantiles", "rates", "require_scipy", "shares"]

# Calls at least in each job, below which amounts are not tested; a share is tested with any number.
FEWEST = 20
# With fewer calls in one job than this, a small chance is made sure of by so many drawings: three
# moments do not tell enough of the tail.
_FEW, _DRAWINGS, _SMALL = 200, 9_999, 0.01


@dataclass
class Spread:
    """How much the tasks of two jobs differ among themselves, against what chance alone would make.

    Accidents hit whole tasks: one that is retried makes all its calls again. Then calls are not
    independent of each other, and a difference is as uncertain as tasks are few and unlike.

    Args:
        found: The squared differences of tasks from their job, added up.
        expected: What they would be if calls were independent.
        tasks: How many there are, but one for each job.
    """

    found: float = 0.0
    expected: float = 0.0
    tasks: int = 0

    def add(self, amounts: Sequence[float], sizes: Sequence[float], variance: float) -> None:
        """Add the tasks of a job.

        Args:
            amounts: Of each task, what was counted.
            sizes: Of each task, that to which it should be in proportion.
            variance: Of the sum of all, if calls were independent.
        """
        total = math.fsum(sizes)
        if len(amounts) < 3 or not total or not variance:
            return
        rate = math.fsum(amounts) / total
        self.found += math.fsum(
            (amount - rate * size) ** 2 for amount, size in zip(amounts, sizes, strict=True)
        )
        self.expected += variance * (len(amounts) - 1) / len(amounts)
        self.tasks += len(amounts) - 1

    @property
    def factor(self) -> float:
        """By how much a variance is larger than that of independent calls; at least 1."""
        return max(1.0, self.found / self.expected) if self.expected else 1.0


def require_scipy() -> None:
    """Make sure that the tests can be made.

    Raises:
        ImportError: scipy is missing; the message says how to install it.
    """
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Whether a difference is more than chance is asked of scipy, which cannot be imported "
            f"({error}); pip install 'mlflow-ctx-autolog[report]'."
        ) from error


def means(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Return how often chance alone makes the means differ so much; None for too few values.

    A permutation test of the difference of means: which values are whose is drawn anew. What comes
    of that has moments known in closed form, and a Pearson type III distribution with these for its
    skewness, so that 100,000 calls cost no more than adding them up. With less than 200 calls in a
    job, a chance below 1 % is found by really drawing, with the same numbers at each time.
    """
    first, second = len(before), len(after)
    number = first + second
    if min(first, second) < FEWEST:
        return None
    mean = (math.fsum(before) + math.fsum(after)) / number
    squares = _moment(before, after, mean, 2) / number
    cubes = _moment(before, after, mean, 3) / number
    variance = squares / second * first / (number - 1)
    third = cubes / second**2 * first * (first - second) / ((number - 1) * (number - 2))
    difference = math.fsum(after) / second - mean
    chance = _two_sided(difference, variance, third)
    if min(first, second) < _FEW and chance < _SMALL:
        chance = max(chance, _drawn(before, after, mean))
    return chance


def _drawn(before: Sequence[float], after: Sequence[float], mean: float) -> float:
    both = [*before, *after]
    fewer = min(before, after, key=len)
    found = abs(math.fsum(fewer) / len(fewer) - mean) * (1 - 1e-12)
    numbers = random.Random(0)
    as_far = sum(
        abs(math.fsum(numbers.sample(both, len(fewer))) / len(fewer) - mean) >= found
        for _ in range(_DRAWINGS)
    )
    return (as_far + 1) / (_DRAWINGS + 1)


def rates(
    before: Sequence[float],
    after: Sequence[float],
    exposures: tuple[float, float],
    spread: Spread | None = None,
) -> float | None:
    """Return how often chance alone makes sums for each unit of exposure differ so much.

    The number of calls is random as well: a compound Poisson distribution, of which the first three
    moments are those of both jobs together.

    Args:
        before: The amount of each call, such as its cost; 1 to count calls.
        after: The same.
        exposures: To what the sums are in proportion, such as rows; 1 and 1 for the sums as such.
        spread: How much tasks differ among themselves.
    """
    one, two = exposures
    if min(len(before), len(after)) < FEWEST or not one or not two:
        return None
    squares = _moment(before, after, 0.0, 2) / (one + two)
    cubes = _moment(before, after, 0.0, 3) / (one + two)
    difference = math.fsum(after) / two - math.fsum(before) / one
    variance = squares * (1 / one + 1 / two)
    chance = _two_sided(difference, variance, cubes * (1 / two**2 - 1 / one**2))
    return _widened(chance, difference, variance, spread)


def shares(
    before: tuple[int, int], after: tuple[int, int], spread: Spread | None = None
) -> float | None:
    """Return how often chance alone makes shares differ so much, by Fisher's exact test.

    Args:
        before: How many have it, of how many.
        after: The same.
        spread: How much tasks differ among themselves.
    """
    from scipy import stats

    (some, all_), (more, all_more) = before, after
    if not all_ or not all_more:
        return None
    chance = float(stats.fisher_exact([[some, all_ - some], [more, all_more - more]])[1])
    share = (some + more) / (all_ + all_more)
    variance = share * (1 - share) * (1 / all_ + 1 / all_more)
    return _widened(chance, more / all_more - some / all_, variance, spread)


def quantiles(before: Sequence[float], after: Sequence[float], percent: int) -> float | None:
    """Return how often chance alone makes a percentile differ so much.

    The same number of values of both jobs lies above a percentile of both together, but for chance:
    Fisher's exact test of these shares. None where fewer than two values of a job can be expected
    above it.
    """
    rest = 1 - percent / 100
    if min(len(before), len(after)) < max(FEWEST, 2 / rest):
        return None
    both = sorted([*before, *after])
    limit = both[max(0, math.ceil(len(both) * percent / 100) - 1)]
    above = [sum(value > limit for value in values) for values in (before, after)]
    return shares((above[0], len(before)), (above[1], len(after)))


def exceeds(some: int, all_: int, limit: float) -> float:
    """Return how often chance alone makes so many of all, were the share no more than the limit."""
    from scipy import stats

    if not all_:
        return 1.0
    return float(stats.binomtest(some, all_, limit, alternative="greater").pvalue)


def holm(chances: Iterable[float | None]) -> list[float | None]:
    """Return the chances of several differences, taken together by Holm's method.

    Where a difference is called more than chance if its number is at most 0.05, one that is none is
    called so in at most 5 of 100 comparisons, however many differences they look at and however
    these hang together.
    """
    given = list(chances)
    known = sorted((each, place) for place, each in enumerate(given) if each is not None)
    adjusted: list[float | None] = [None] * len(given)
    highest = 0.0
    for rank, (chance, place) in enumerate(known):
        highest = max(highest, min(1.0, chance * (len(known) - rank)))
        adjusted[place] = highest
    return adjusted


def _moment(before: Sequence[float], after: Sequence[float], mean: float, power: int) -> float:
    return math.fsum((value - mean) ** power for values in (before, after) for value in values)


def _two_sided(difference: float, variance: float, third: float) -> float:
    """Return the chance of a difference from 0, given variance and third moment."""
    from scipy import stats

    # Rounding alone makes a variance of equal values.
    if variance <= 1e-24 * max(1.0, difference**2) and abs(difference) < 1e-12:
        return 1.0
    distribution = stats.pearson3(third / variance**1.5)
    score = difference / math.sqrt(variance)
    return min(1.0, 2 * float(min(distribution.sf(score), distribution.cdf(score))))


def _widened(chance: float, difference: float, variance: float, spread: Spread | None) -> float:
    """Return a chance that is no smaller than the differences among tasks allow."""
    from scipy import stats

    if spread is None or spread.factor <= 1.0 or not variance:
        return chance
    score = abs(difference) / math.sqrt(variance * spread.factor)
    return max(chance, 2 * float(stats.t.sf(score, spread.tasks)))
