"""The request body of /v1/embeddings."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sagellm.gateway.api_errors import wrong
from sagellm.gateway.protocol.bodies import TokenIds, convert
from sagellm.gateway.protocol.json import read_json
from sagellm.gateway.protocol.other_apis import Foreign
from sagellm.gateway.protocol.request import (
    Hint,
    NonEmptyText,
    RequestId,
    TokenId,
    WaitSeconds,
    at_most,
    check_model_name,
    known_fields,
)
from sagellm.gateway.settings import RequestLimits
from sagellm.runtime.messages import PRIORITIES

# Fields of vLLM's embeddings that are not built.
EMBEDDING = Foreign(
    unbuilt={
        "additional_data": (),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "messages": (),
        "mm_processor_kwargs": ({},),
        "normalize": (),
        "use_activation": (),
    },
    taken={},
    cures={"prompt": "send `input`", "texts": "send `input`"},
)
Input = NonEmptyText | Annotated[list[NonEmptyText | TokenId | TokenIds], Meta(min_length=1)]


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The texts to embed, as texts or as token ids.

    `dimensions`: keep the first numbers of each vector (Matryoshka), and scale it again. A text of
    more tokens than the model takes is refused; `truncate_prompt_tokens` cuts its end instead, -1
    to what the model takes. `priority` is from 0 (critical) to 4 (background). The hint `user` is
    accepted and has no effect.
    """

    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, lt=1 << 20)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    add_special_tokens: bool = True
    priority: Annotated[int, Meta(ge=0, le=max(PRIORITIES.values()))] | None = None
    request_id: RequestId | None = None
    timeout_s: WaitSeconds | None = None
    user: Hint | None = None

    @property
    def texts(self) -> tuple[str | tuple[int, ...], ...]:
        """The texts, each as text or as token ids."""
        if isinstance(self.input, str):
            return (self.input,)
        if isinstance(self.input[0], int):
            return (_ids(self.input),)
        return tuple(one if isinstance(one, str) else _ids(one) for one in self.input)


def read_embedding(body: bytes, limits: RequestLimits) -> EmbeddingRequest:
    """Read a body of /v1/embeddings. Raises ApiError (400). Limits of the model come later."""
    value = read_json(body, max_depth=limits.json_depth)
    request = convert(known_fields(value, EmbeddingRequest, EMBEDDING), EmbeddingRequest)
    check_model_name(request.model, limits)
    if request.truncate_prompt_tokens == 0:
        raise wrong("truncate_prompt_tokens", "is 0, which keeps no token; send -1, or 1 or more")
    if not isinstance(request.input, str):
        kinds = {type(one) for one in request.input}
        if len(kinds) > 1:
            raise wrong("input", "mixes text, token ids and lists of them; use one kind")
        if int not in kinds:
            at_most("input", len(request.input), limits.num_prompts, "texts")
    return request


def _ids(text: Any) -> tuple[int, ...]:
    return tuple(text)
