"""The cost of the gateway, compared with a bare server that echoes: `sagellm bench gateway`."""
