"""The studies of this wing: each checks the claims of one paper."""
