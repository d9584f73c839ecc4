"""One typed description of a run."""
