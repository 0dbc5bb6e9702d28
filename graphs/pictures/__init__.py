"""Pictures of a graph, of either dialect: text to read and compare, Mermaid, SVG."""

from collections.abc import Callable

from sagellm.graphs.ir import Graph
from sagellm.graphs.pictures.mermaid import to_mermaid
from sagellm.graphs.pictures.svg import to_svg
from sagellm.graphs.pictures.text import to_text

FORMATS: dict[str, Callable[[Graph], str]] = {
    "text": to_text,
    "mermaid": to_mermaid,
    "svg": to_svg,
}

__all__ = ["FORMATS", "to_mermaid", "to_svg", "to_text"]
