"""An adapter made into another, on files: no model is loaded."""

from finespun.convert.convert import Converted, convert

__all__ = ["Converted", "convert"]
