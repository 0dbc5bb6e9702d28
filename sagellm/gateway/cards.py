"""What clients are told of the models that are served: names, limits, one frozen record each."""

import time
from dataclasses import dataclass

from sagellm.gateway.protocol.sampling import ModelFacts
from sagellm.gateway.settings import Settings
from sagellm.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model that is served. `names` are what clients may call it, the first in answers; `key`
    what the graph calls it, where it serves several.
    """

    names: tuple[str, ...]
    key: str = ""
    root: str
    max_model_len: int
    vocab_size: int
    created: int  # seconds of the wall clock, as the API has it

    @property
    def id(self) -> str:
        return self.names[0]

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts(self.vocab_size, self.max_model_len)


def model_cards(session: Session, settings: Settings) -> tuple[ModelCard, ...]:
    """What clients are told of the models, in the order of the session's.

    The settings name the only model of a graph; several have the names of their table. No card
    holds a path of this machine.
    """
    models, created = session.models, int(time.time())
    cards = []
    for model in models.all:
        names = model.served.names if models.is_several else settings.served_models
        cards.append(
            ModelCard(
                names=names,
                key=model.key if models.is_several else "",
                root=names[0],
                max_model_len=session.max_model_len_of(model.key),
                vocab_size=model.tokenizer.vocab_size,
                created=created,
            )
        )
    return tuple(cards)
