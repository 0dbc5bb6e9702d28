"""What one more row in a step costs, from the steps' own times."""

from dataclasses import dataclass

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


class StepCosts:
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
