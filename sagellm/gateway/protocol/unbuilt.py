"""Fields of other APIs that are not built: refused, unless they ask for nothing.

What one endpoint builds and another does not stands here too: an endpoint looks at its own first.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from sagellm.gateway.failure import ApiError

# Field -> the values, beside null, with which it asks for what happens anyway.
Unbuilt: TypeAlias = Mapping[str, tuple[Any, ...]]

REQUEST: Unbuilt = {
    # OpenAI
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # there are no tool calls
    "response_format": ({"type": "text"},),
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
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
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
    "structured_outputs": (),
    "thinking_token_budget": (-1,),
    "trust_remote_code": (False,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    # SGLang
    "ebnf": (),
    "json_schema": (),
    "lora_path": (),
    "regex": (),
}
STREAM_OPTIONS: Unbuilt = {"include_obfuscation": (False,)}
MESSAGE: Unbuilt = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}
PART: Unbuilt = {
    "annotations": ([],),
    "audio_url": (),
    "file": (),
    "image_url": (),
    "input_audio": (),
    "refusal": (),
    "video_url": (),
}


def refuse_unbuilt(param: str, value: Any, harmless: tuple[Any, ...]) -> None:
    """Raise ApiError (400) unless the value is null or asks for nothing."""
    if value is None or any(_is_same(value, plain) for plain in harmless):
        return
    message = f"{param}: this server does not support it; leave it out"
    raise ApiError(400, message, param=param, code="unsupported_parameter")


def _is_same(value: Any, plain: Any) -> bool:
    """Equal and of one type: 1 is not True."""
    return type(value) is type(plain) and value == plain
