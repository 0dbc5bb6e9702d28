"""Reading requests: from the bytes of a body to a request that is checked field by field."""
