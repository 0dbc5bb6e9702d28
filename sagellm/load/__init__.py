"""Load on an OpenAI-compatible server, and what it measures.

A load generator of our own: guidellm and aiperf do more, and bring torch, transformers and a
hundred packages with them, which have no place beside a server. What is measured is defined as they
define it (see `sagellm.load.sender`), so that results can be laid side by side.
"""
