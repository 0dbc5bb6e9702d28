"""The formats of models without tools: plain text, and text after reasoning.

Templates whose calls no format knows are plain too.
"""

from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.reasoning import THINK

PLAIN = BlockFormat(name="plain", signs=())
THINKING = BlockFormat(name="thinking", signs=(THINK.closing,), tags=THINK)
