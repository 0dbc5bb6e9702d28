"""How many tokens to draft: acceptance rates, and what one more row of a step costs."""

import math
from dataclasses import dataclass

# Of one sequence.
_DECAY = 0.75  # of what is remembered, per step with drafts: the last four count most
_PRIOR = 2.0  # the engine's own rate counts as much as so many tested tokens
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 256  # steps without a draft

# Of steps.
_WEIGHT = 0.2  # of the newest step of a size
_OUTLIER = 2.0  # times the mean that a step counts at most: the machine was busy elsewhere
_FINE = 16  # up to so many rows, each number of rows has a mean of its own
_NEAR = 1.5  # a size that differs by more than this factor says little about a step
_LEAST = 0.1  # the least price of a row: drafts right less often than that only fill the batch


class Acceptance:
    """The rate at which draft tokens are accepted; the latest drafts count most."""

    def __init__(self, decay: float, right: float = 0.0, tested: float = 0.0) -> None:
        self._decay = decay
        self._right = right
        self._tested = tested

    def learn(self, num_drafts: int, num_right: int) -> None:
        # Drafts after the first wrong draft were never tested.
        self._right = self._right * self._decay + num_right
        self._tested = self._tested * self._decay + min(num_drafts, num_right + 1)

    def rate(self, prior: float) -> float:
        """The rate, drawn towards `prior` while few drafts were tested."""
        return (self._right + _PRIOR * prior) / (self._tested + _PRIOR)


class DraftLength:
    """The draft length of one sequence, at most `most` tokens.

    It grows by one when all drafts were right. When a draft was wrong it halves, but not below the
    number of right drafts. When not even one token pays, the sequence pauses, each time for twice
    as many steps, and then drafts a single token on trial. It counts steps and has no clock.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = most
        self._acceptance = Acceptance(_DECAY)
        self._pause = 0  # steps that are left of the pause
        self._next_pause = _FIRST_PAUSE
        self._is_on_trial = False

    def next(self, price: float, prior: float) -> int:
        """Tokens to draft in this step.

        `price`: answer tokens that the time of one more row would give without drafts. `prior`: the
        acceptance rate of the whole engine.
        """
        if self._pause:
            self._pause -= 1
            return 0
        if self._is_on_trial:
            return 1
        length = min(self._length, _affordable(price, self._acceptance.rate(prior)))
        if not length:
            self._start_pause()
        return length

    def learn(self, num_drafts: int, num_right: int) -> None:
        """Take the outcome of a step with at least one draft."""
        self._acceptance.learn(num_drafts, num_right)
        was_trial, self._is_on_trial = self._is_on_trial, False
        if num_right == num_drafts:
            self._length = min(self._most, self._length + 1)
            if not was_trial:
                self._next_pause = _FIRST_PAUSE
        else:
            self._length = max(num_right, num_drafts // 2)
            if not self._length:
                self._start_pause()

    def _start_pause(self) -> None:
        self._pause, self._is_on_trial = self._next_pause, True
        self._length = max(self._length, 1)
        self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)


def _affordable(price: float, rate: float) -> int:
    """The longest draft whose last token is right with a probability of at least `price`."""
    if rate < price:
        return 0
    return int(math.log(price) / math.log(min(rate, 0.99)) + 1e-9)


@dataclass(slots=True)
class _Size:
    """Steps of about the same number of rows: their mean rows and seconds."""

    rows: float
    seconds: float

    def add(self, rows: int, seconds: float) -> None:
        self.rows += _WEIGHT * (rows - self.rows)
        self.seconds += _WEIGHT * (min(seconds, _OUTLIER * self.seconds) - self.seconds)


class StepTimes:
    """Moving averages of step time by number of rows. A line through nearby sizes prices a row.

    Each size counts once, however often it was seen: steps without drafts are rare when all drafts
    are right. Only steps without prompts are observed.
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
        """Answer tokens that steps without drafts give in the time of one more row, at least 0.1.

        A step of `num_rows` rows gives `num_decodes` sequences one token each; with every draft it
        has `most` rows. Drafting a token takes `token_s`. At a price of 1, a row costs what a token
        costs, so not even a sure draft gains anything.
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
    """The number of rows itself up to 16, rounded down to three binary digits beyond."""
    coarse = max(0, rows.bit_length() - 3) if rows > _FINE else 0
    return rows >> coarse << coarse
