"""From the bytes of a body to the fields that its object says."""

from typing import Any

import msgspec

from sagellm.gateway.protocol.fields import fields_of
from sagellm.gateway.protocol.foreign import REQUEST, STREAM_OPTIONS
from sagellm.gateway.protocol.json import read_json
from sagellm.gateway.protocol.request import StreamOptions
from sagellm.gateway.settings import Limits


def read_fields(body: bytes, struct: type[msgspec.Struct], limits: Limits) -> dict[str, Any]:
    """What the body says of the fields of `struct`, types unchecked. Raises ApiError (400)."""
    value = read_json(body, max_depth=limits.json_depth)
    said = fields_of(value, struct.__struct_fields__, REQUEST)
    if "stream_options" in said:
        options = StreamOptions.__struct_fields__
        said["stream_options"] = fields_of(
            said["stream_options"], options, STREAM_OPTIONS, "stream_options"
        )
    return said
