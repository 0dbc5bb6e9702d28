"""Other engines, each in its own environment: `sagellm bench peers`."""
