"""How many tokens to draft: acceptance rates, and what one more row of a step costs."""

import math
from dataclasses import dataclass

_DECAY = 0.75  # of what is remembered, a draft: the last four count most
_PRIOR = 2.0  # tokens' worth of trust in the engine's own figure
_FIRST_REST, _LONGEST_REST = 8, 256  # steps without a draft


class Acceptance:
    """The share of tested draft tokens that were right, the latest counting most."""

    def __init__(self, decay: float, right: float = 0.0, tested: float = 0.0) -> None:
        self._decay = decay
        self._right = right
        self._tested = tested

    def learn(self, num_drafts: int, num_right: int) -> None:
        """Drafts behind the first wrong one were never tested."""
        self._right = self._right * self._decay + num_right
        self._tested = self._tested * self._decay + min(num_drafts, num_right + 1)

    def rate(self, prior: float) -> float:
        return (self._right + _PRIOR * prior) / (self._tested + _PRIOR)


class DraftLength:
    """The draft length of one sequence.

    It grows by one where all drafts were right, and halves, down to what was right, where one was
    wrong. Where even one token does not pay, the sequence rests, each time twice as long, and
    then drafts a single token to see whether that has changed. Counts steps, knows no clock.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = most
        self._acceptance = Acceptance(_DECAY)
        self._rest = 0
        self._next_rest = _FIRST_REST
        self._is_on_trial = False

    def want(self, price: float, prior: float) -> int:
        """Tokens to draft in this step.

        `price`: answer tokens that the time of one more row would give otherwise; `prior`: the
        acceptance rate of the whole engine.
        """
        if self._rest:
            self._rest -= 1
            return 0
        if self._is_on_trial:
            return 1
        length = min(self._length, _affordable(price, self._acceptance.rate(prior)))
        if not length:
            self._lie_down()
        return length

    def learn(self, num_drafts: int, num_right: int) -> None:
        """What became of the drafts of a step; `num_drafts` is at least one."""
        self._acceptance.learn(num_drafts, num_right)
        was_trial, self._is_on_trial = self._is_on_trial, False
        if num_right == num_drafts:
            self._length = min(self._most, self._length + 1)
            if not was_trial:
                self._next_rest = _FIRST_REST
        else:
            self._length = max(num_right, num_drafts // 2)
            if not self._length:
                self._lie_down()

    def _lie_down(self) -> None:
        self._rest, self._is_on_trial = self._next_rest, True
        self._length = max(self._length, 1)
        self._next_rest = min(2 * self._next_rest, _LONGEST_REST)


def _affordable(price: float, rate: float) -> int:
    """The longest draft whose last token is right with a chance of at least `price`."""
    if rate < price:
        return 0
    return int(math.log(price) / math.log(min(rate, 0.99)) + 1e-9)


_WEIGHT = 0.2  # of the newest step of a size
_OUTLIER = 2.0  # times the mean that a step counts at most: the machine was busy elsewhere
_FINE = 16  # numbers of rows up to which each has a mean of its own
_NEAR = 1.5  # sizes beyond by this factor say little of the steps in question
_LEAST = 0.1  # no row is cheaper: what is right less often only fills the batch


@dataclass(slots=True)
class _Size:
    """Steps of about the same number of rows: their mean rows and seconds."""

    rows: float
    seconds: float

    def add(self, rows: int, seconds: float) -> None:
        self.rows += _WEIGHT * (rows - self.rows)
        self.seconds += _WEIGHT * (min(seconds, _OUTLIER * self.seconds) - self.seconds)


class StepTimes:
    """Moving averages of step time by number of rows; a line through those nearby prices a row.

    Each size counts once, however often it was seen: a step without drafts is rare where all are
    right. Only steps without prompts are observed.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def observe(self, rows: int, seconds: float) -> None:
        key = _key(rows)
        if key in self._sizes:
            self._sizes[key].add(rows, seconds)
        else:
            self._sizes[key] = _Size(rows, seconds)

    def price(self, num_decodes: int, num_rows: int, *, most: int, token_s: float) -> float:
        """Answer tokens that go without in the time of one more row, at least 0.1.

        `num_decodes` sequences get one token each from a step of `num_rows` rows as it is, and of
        `most` with every draft; drafting a token takes `token_s`. 1 means: a row costs what a token
        costs, so that not even a sure draft gains anything.
        """
        near = [
            size
            for size in self._sizes.values()
            if num_decodes / _NEAR <= size.rows <= most * _NEAR
        ]
        if not near:
            return _LEAST
        rows = sum(size.rows for size in near) / len(near)
        seconds = sum(size.seconds for size in near) / len(near)
        spread = sum((size.rows - rows) ** 2 for size in near)
        slope = sum((size.rows - rows) * (size.seconds - seconds) for size in near)
        row_s = max(0.0, slope / spread) if spread else 0.0
        step_s = seconds + row_s * (num_rows - rows)
        return max(_LEAST, (row_s + token_s) * num_decodes / step_s) if step_s > 0 else _LEAST


def _key(rows: int) -> int:
    """Itself up to 16, then to three binary digits."""
    coarse = max(0, rows.bit_length() - 3) if rows > _FINE else 0
    return rows >> coarse << coarse
