"""The studies of this wing: one module for each method, of the same name."""
