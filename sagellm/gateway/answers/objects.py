"""The JSON objects of answers, with the field names of the OpenAI API and of vLLM."""

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

ApiFinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter"]
TokenCount: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Ids: TypeAlias = tuple[int, ...]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """The tokens of the prompt whose keys and values were there already."""

    cached_tokens: TokenCount = 0


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """The tokens of the answer that were reasoning."""

    reasoning_tokens: TokenCount = 0


class ApiUsage(msgspec.Struct, frozen=True):
    """Tokens of one call: every prompt once, and all choices."""

    prompt_tokens: TokenCount
    completion_tokens: TokenCount
    total_tokens: TokenCount
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class EmbeddingEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The vector of one text: numbers, or the base64 of float32, little-endian."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: msgspec.Raw


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of all texts."""

    prompt_tokens: TokenCount
    total_tokens: TokenCount


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingUsage


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists over the tokens; a prompt's first token has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # in characters, from the start of the choice's text


class PromptLogprob(msgspec.Struct, frozen=True):
    """One token at a place of the prompt, as vLLM has it. `rank` 1: none is more likely."""

    logprob: float
    rank: int | None
    decoded_token: str


# Token id -> logprob, the prompt's own token first. The prompt's first token has None.
PromptLogprobs: TypeAlias = list[dict[int, PromptLogprob] | None]


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: ApiFinishReason | None = None
    stop_reason: str | int | None = None
    prompt_token_ids: Ids | UnsetType = UNSET
    token_ids: Ids | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: ApiUsage


class CompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a streamed completion; the last, where usage was asked for, has no choices."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: ApiUsage | UnsetType | None = UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatLogprob]


class CalledFunction(msgspec.Struct, frozen=True):
    """`arguments`: the JSON text of an object, as the model wrote it."""

    name: str
    arguments: str


class ChatToolCall(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """`content` is null if there are only tool calls. The reasoning has two names, as in vLLM."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ChatToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ApiFinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: Ids | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ApiUsage
    prompt_token_ids: Ids | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ToolCallChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of one tool call. Only the first piece has `id`, `type` and the function's name."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(msgspec.Struct, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallChunk] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ApiFinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: Ids | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a streamed chat; the last, where usage was asked for, has no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: ApiUsage | UnsetType | None = UNSET
    prompt_token_ids: Ids | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sagellm"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class TokenizeAnswer(msgspec.Struct, frozen=True):
    count: TokenCount
    max_model_len: int
    tokens: Ids
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str


class TokenizerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that a client needs to count and cut as the server does. Special tokens as text."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    chat_template: str | None = None


class Cancelled(msgspec.Struct, frozen=True):
    id: str
    cancelled: bool
