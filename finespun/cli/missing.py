"""The message where a package of one of the extras is not installed."""

EXTRAS = {
    "click": "cli",
    "typer": "cli",
    "rich": "cli",
    "pydantic": "cli",
    "yaml": "cli",
    "transformers": "train",
    "polars": "train",
    "matplotlib": "bench",
    "sklearn": "bench",
    "scipy": "bench",
}


def advice(error: ModuleNotFoundError) -> str | None:
    """The extra to install, as one line; None for a package that no extra brings.

    >>> advice(ModuleNotFoundError("No module named 'polars'", name="polars"))
    "polars is not installed; try: pip install 'finespun[train]'"
    """
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    return f"{name} is not installed; try: pip install 'finespun[{EXTRAS[name]}]'"
