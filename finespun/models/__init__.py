"""Base models by name or folder."""
