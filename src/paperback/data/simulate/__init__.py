"""Simulated worlds: data whose truth is known."""
