"""Loading without noise: transformers' reports kept off the screen, errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


def reason(error: Exception) -> str:
    """The first line of what an error says, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' load reports and progress bars off the screen."""
    from transformers import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
