"""Mathematics that two wings or more use."""
