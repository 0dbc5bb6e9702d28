"""Fields of other APIs, for each object that clients send: those unbuilt, and those taken."""

from typing import NamedTuple

from sagellm.gateway.protocol import taken, unbuilt
from sagellm.gateway.protocol.taken import Takes
from sagellm.gateway.protocol.unbuilt import Unbuilt


class Foreign(NamedTuple):
    """`unbuilt` fields are refused unless they ask for nothing; `taken` ones change no token."""

    unbuilt: Unbuilt
    taken: Takes


REQUEST = Foreign(unbuilt.REQUEST, taken.REQUEST)
STREAM_OPTIONS = Foreign(unbuilt.STREAM_OPTIONS, {})
MESSAGE = Foreign(unbuilt.MESSAGE, taken.MESSAGE)
PART = Foreign(unbuilt.PART, taken.PART)
TOOL_CALL = Foreign({}, taken.TOOL_CALL)
FUNCTION_CALL = Foreign({}, {})
