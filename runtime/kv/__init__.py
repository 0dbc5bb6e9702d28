"""KV blocks of engines: pools, leases, prefix caching, and transfers between workers."""
