"""Folders written whole or not at all, and the one door for reading what is untrusted."""
