"""Text forms of graphs: YAML, JSON and MessagePack; terminal text, Mermaid and SVG."""
