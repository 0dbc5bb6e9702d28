"""Names that clients give to fields, and how they may be shown to them again."""

import re

_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def shown(name: str) -> str:
    """A field's name, unless it could be anything else: then only its length."""
    return f"`{name}`" if _PLAIN.fullmatch(name) else f"of {len(name)} characters"
