"""Kinds of layers that a delta can act in."""
