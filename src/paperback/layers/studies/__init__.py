"""One study per method of this wing, under the method's name."""
