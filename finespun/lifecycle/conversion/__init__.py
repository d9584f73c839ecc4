"""An adapter made into another, on files: no model is loaded."""

from finespun.lifecycle.conversion.adapter import Converted, convert

__all__ = ["Converted", "convert"]
