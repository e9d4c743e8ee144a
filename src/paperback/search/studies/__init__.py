"""The studies of this wing, one module a method."""
