"""A tool for examples/tools.py and for `sagellm chat --tools examples/weather_tools.py`."""

DEGREES = {"Paris": 21, "Rome": 27, "Oslo": 12}


def get_weather(city: str) -> dict[str, object]:
    """The weather in a city now.

    Args:
        city: The name of the city.
    """
    if city not in DEGREES:
        raise LookupError(f"no weather is known for {city}; there are {', '.join(DEGREES)}")
    return {"city": city, "weather": "sunny", "degrees": DEGREES[city]}
