"""How many tokens to draft for one sequence: as many as were right lately, and as pay."""

import math

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


class Pace:
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
