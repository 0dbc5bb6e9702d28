"""Tables of fields of other APIs (OpenAI, vLLM, SGLang), for each object that clients send.

An unbuilt field is refused, unless its value is the default of its API. A taken field does not
change the answer: its type is checked, and the field is dropped. If a body's own type has a field
of these tables, the field is read and the table has no effect. A cure names the field that this API
has for a field of another API.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from sagellm.gateway.api_errors import ApiError, wrong

# Field -> the accepted values, besides null: those that ask for the default.
Unbuilt: TypeAlias = Mapping[str, tuple[Any, ...]]


class IgnoredField(NamedTuple):
    """A field that is checked and dropped.

    `type`: a type of JSON schema. `note`: the reason why the field changes no token.
    """

    type: str
    note: str


class Foreign(NamedTuple):
    """The fields of other APIs that one object may have, and what to send instead of others."""

    unbuilt: Unbuilt
    taken: Mapping[str, IgnoredField]
    cures: Mapping[str, str] = MappingProxyType({})


REQUEST = Foreign(
    unbuilt={
        # OpenAI
        "audio": (),
        "best_of": (1,),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),  # completions make no tool calls
        "suffix": (),
        "tool_choice": ("none",),
        "tools": ([],),
        "web_search_options": (),
        # vLLM
        "add_generation_prompt": (True,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "documents": ([],),
        "ec_transfer_params": (),
        "guided_decoding_backend": (),
        "guided_whitespace_pattern": (),
        "include_reasoning": (True,),
        "kv_transfer_params": (),
        "length_penalty": (1,),
        "logits_processors": ([],),
        "logprob_token_ids": (),
        "lora": (),
        "lora_request": (),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "prompt_embeds": (),
        "repetition_detection": (),
        "return_prompt_text": (False,),
        "return_token_offsets": (False,),
        "session_id": (),
        "spaces_between_special_tokens": (True,),
        "stream_interval": (1,),
        "thinking_token_budget": (-1,),
        "trust_remote_code": (False,),
        "use_beam_search": (False,),
        "vllm_xargs": ({},),
        "watermarking": (False,),
        # SGLang
        "lora_path": (),
    },
    taken={
        "metadata": IgnoredField("object", "labels for the caller's own records"),
        "prediction": IgnoredField(
            "object", "a guess of the answer; `speculation` is set in the graph"
        ),
        "prompt_cache_options": IgnoredField("object", "prefixes are kept in any case"),
        "prompt_cache_retention": IgnoredField("string", "prefixes are kept in any case"),
        "reasoning": IgnoredField("object", "`reasoning_effort` is read instead"),
        "service_tier": IgnoredField("string", "there is one tier; `priority` orders requests"),
        "store": IgnoredField("boolean", "no answer is stored"),
        "timeout": IgnoredField("number", "the client's own; `timeout_s` ends a request here"),
        "verbosity": IgnoredField("string", "a hint"),
    },
)
_FORMAT_CURE = "send `response_format`"
COMPLETION = REQUEST._replace(
    cures={
        "input": "send `prompt`",
        "max_output_tokens": "send `max_tokens`",
        "messages": "send chats to /v1/chat/completions",
        "stop_sequences": "send `stop`",
        "text": _FORMAT_CURE,
    }
)
_SYSTEM_CURE = "send it as a message of the role `system`"
CHAT = REQUEST._replace(
    cures={
        "function_call": "send `tool_choice`",
        "functions": "send `tools`",
        "input": "send `messages`",
        "instructions": _SYSTEM_CURE,
        "max_output_tokens": "send `max_completion_tokens`",
        "output_config": _FORMAT_CURE,
        "output_format": _FORMAT_CURE,
        "prompt": "send `messages`",
        "stop_sequences": "send `stop`",
        "system": _SYSTEM_CURE,
        "text": _FORMAT_CURE,
        "thinking": "send `reasoning_effort`",
    }
)
STREAM_OPTIONS = Foreign(unbuilt={"include_obfuscation": (False,)}, taken={})
RESPONSE_FORMAT = Foreign(
    {}, {}, dict.fromkeys(("description", "name", "schema", "strict"), "send it in `json_schema`")
)
JSON_SCHEMA = Foreign(
    {}, {}, dict.fromkeys(("$defs", "properties", "required", "type"), "send it in `schema`")
)
STRUCTURED_OUTPUTS = Foreign(
    unbuilt={
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (False,),
        "disable_fallback": (False,),
        "structural_tag": (),
        "whitespace_pattern": (),
    },
    taken={},
)
MESSAGE = Foreign(
    unbuilt={
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "images": ([],),
        "refusal": (),
    },
    taken={
        "cache_control": IgnoredField("object", "prefixes are kept in any case"),
        "id": IgnoredField("string", "no template reads it"),
        "parsed": IgnoredField("object", "the OpenAI clients add it; `content` has the text"),
        "provider_specific_fields": IgnoredField("object", "LiteLLM adds it to answers"),
        "reasoning_details": IgnoredField("array", "`reasoning` has the text"),
        "thinking_blocks": IgnoredField("array", "`reasoning_content` has the text"),
    },
    cures={"function_call": "send `tool_calls`", "tool_use_id": "send `tool_call_id`"},
)
PART = Foreign(
    unbuilt={
        "annotations": ([],),
        "audio_url": (),
        "file": (),
        "image_url": (),
        "input_audio": (),
        "refusal": (),
        "video_url": (),
    },
    taken={
        "cache_control": IgnoredField("object", "prefixes are kept in any case"),
        "prompt_cache_breakpoint": IgnoredField("object", "prefixes are kept in any case"),
    },
)
TOOL = Foreign(
    unbuilt={},
    taken={"cache_control": IgnoredField("object", "prefixes are kept in any case")},
    cures={
        **dict.fromkeys(("description", "name", "parameters", "strict"), "send it in `function`"),
        "input_schema": "send it as `parameters` in `function`",
    },
)
TOOL_FUNCTION = Foreign(
    unbuilt={},
    taken={"return": IgnoredField("object", "transformers adds it; templates show arguments")},
    cures={"input_schema": "send `parameters`"},
)
TOOL_CHOICE = Foreign(
    {},
    {},
    {
        "disable_parallel_tool_use": "send `parallel_tool_calls`",
        "mode": "send it in `allowed_tools`",
        "name": "send it in `function`",
        "tools": "send it in `allowed_tools`",
    },
)
TOOL_CALL = Foreign(
    unbuilt={},
    taken={
        "index": IgnoredField("integer", "the place of a call in its list says the same"),
        "provider_specific_fields": IgnoredField("object", "LiteLLM adds it to answers"),
    },
    cures={
        **dict.fromkeys(("arguments", "name"), "send it in `function`"),
        "call_id": "send `id`",
        "input": "send its JSON text as `arguments` in `function`",
    },
)
FUNCTION_CALL = Foreign(
    unbuilt={},
    taken={
        "parsed_arguments": IgnoredField(
            "object", "the OpenAI clients add it; `arguments` has the text"
        ),
    },
)
_TYPES: dict[str, tuple[type, ...]] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}


def refuse_unbuilt(
    param: str, value: Any, harmless: tuple[Any, ...], *, cure: str | None = None
) -> None:
    """Raise ApiError (400) unless the value is null or one of `harmless`, the defaults."""
    if value is None or any(_is_same(value, plain) for plain in harmless):
        return
    message = f"{param}: this server does not support it; {cure or 'leave it out'}"
    raise ApiError(400, message, param=param, code="unsupported_parameter")


def _is_same(value: Any, plain: Any) -> bool:
    """Whether two values are equal and have the same type: 1 is not True."""
    return type(value) is type(plain) and value == plain


def check_ignored(param: str, value: Any, taken: IgnoredField) -> None:
    """Raise ApiError (400) if the value is not null and has another type than `taken.type`."""
    if value is None or type(value) in _TYPES[taken.type]:
        return
    article = "an" if taken.type[0] in "aeio" else "a"
    raise wrong(param, f"must be {article} {taken.type}")
