"""Rows of logits of sequences that no engine computes."""

import numpy as np

from sagellm.backends import LogitsRow
from sagellm.backends.sampler import sample
from sagellm.runtime.engine.output import Mailbox
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.sampling import Sampling

LOGITS = np.array([0.5, 2.0, 1.0, -1.0, 1.9, 0.0], dtype=np.float32)


def row(output=(), prompt=(0,), choice=0, stop_ids=(), **sampling):
    state = SequenceState(
        owner="o",
        request_id="r",
        choice=choice,
        prompt_token_ids=tuple(prompt),
        emitted_token_ids=tuple(output),
        sampling=Sampling(**{"seed": 1, **sampling}),
    )
    sequence = Sequence(
        state,
        arrival=1,
        mailbox=Mailbox(lambda: None),
        max_output=100,
        stop_ids=frozenset(stop_ids),
        output_text=None,
    )
    return LogitsRow(sequence, len(sequence.tokens))


def floats(*numbers):
    return np.array(numbers, dtype=np.float32)


def repeated(count, logits=LOGITS):
    """Rows of the same logits."""
    return np.repeat(logits[None], count, 0)


def sample_one(one, logits=LOGITS):
    return sample(logits[None].copy(), [one]).token_ids[0]
