"""Other engines, each in an environment of its own: `sagellm bench peers`."""
