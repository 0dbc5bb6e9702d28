"""Fields of the OpenAI API and of vLLM that are not built: refused, unless they ask for nothing."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from sagellm.gateway.failure import ApiError

# Field -> the values, beside null, with which it asks for what happens anyway.
Unbuilt: TypeAlias = Mapping[str, tuple[Any, ...]]

REQUEST: Unbuilt = {
    # OpenAI
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # there are no tool calls
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": (),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
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
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
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
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_calls": ([],),
}
PART: Unbuilt = {
    "annotations": ([],),
    "audio_url": (),
    "cache_control": (),
    "file": (),
    "image_url": (),
    "input_audio": (),
    "prompt_cache_breakpoint": (),
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
