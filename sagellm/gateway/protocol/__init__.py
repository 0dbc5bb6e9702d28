"""Reading requests: from the bytes of a body to a request with all fields checked."""
