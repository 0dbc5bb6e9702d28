"""What each path takes and answers, for the OpenAPI document."""

from dataclasses import dataclass

from sagellm.gateway.answers import structs
from sagellm.gateway.protocol.chat import ChatRequest
from sagellm.gateway.protocol.completions import CompletionRequest
from sagellm.gateway.protocol.schemas import Struct
from sagellm.gateway.protocol.tokenize import DetokenizeRequest, TokenizeChat, TokenizePrompt

EVENTS = "text/event-stream"
TEXT = "text/plain"
HTML = "text/html"


@dataclass(frozen=True, slots=True)
class Operation:
    """`takes`: what a body may be. `gives`: the JSON of an answer, where there is one.

    `also` is another media type that an answer may have: that of a stream, or of plain text.
    """

    summary: str
    takes: tuple[Struct, ...] = ()
    gives: tuple[Struct, ...] = ()
    also: str = ""
    is_empty: bool = False


OPERATIONS: dict[str, Operation] = {
    "/v1/models": Operation("The models that are served", gives=(structs.Models,)),
    "/v1/models/{id}": Operation("One model", gives=(structs.Model,)),
    "/v1/completions": Operation(
        "Continue a text", (CompletionRequest,), (structs.Completion,), EVENTS
    ),
    "/v1/chat/completions": Operation(
        "Answer a conversation", (ChatRequest,), (structs.ChatCompletion,), EVENTS
    ),
    "/invocations": Operation(
        "A completion or a chat, by what the body holds",
        (CompletionRequest, ChatRequest),
        (structs.Completion, structs.ChatCompletion),
        EVENTS,
    ),
    "/tokenize": Operation("Text to token ids", (TokenizePrompt, TokenizeChat), (structs.Tokens,)),
    "/detokenize": Operation("Token ids to text", (DetokenizeRequest,), (structs.Detokenized,)),
    "/tokenizer_info": Operation("Facts of the tokenizer", gives=(structs.TokenizerFacts,)),
    "/v1/sagellm/requests/{id}/cancel": Operation("End a request", gives=(structs.Cancelled,)),
    "/live": Operation("Whether the process answers", is_empty=True),
    "/ready": Operation("Whether tokens are being produced", is_empty=True),
    "/health": Operation("Whether the server is healthy", is_empty=True),
    "/ping": Operation("Whether the server is healthy", is_empty=True),
    "/openapi.json": Operation("This document"),
    "/docs": Operation("This document as a page", also=HTML),
    "/version": Operation("The version of this server"),
    "/load": Operation("How many requests are under way"),
    "/metrics": Operation("Metrics in the format of Prometheus", also=TEXT),
    "/v1/sagellm/graph": Operation("The graph that is open"),
}
