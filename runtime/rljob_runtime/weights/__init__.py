"""Weight versions as bytes: encode, store, fetch, verify."""
