"""What the gateway costs, beside the bare server with an echo: `sagellm bench gateway`."""
