"""Engines of other systems, behind the engine port: servers that speak the OpenAI API."""
