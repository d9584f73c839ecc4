"""Folders written whole or not at all, and the one place that reads untrusted input."""
