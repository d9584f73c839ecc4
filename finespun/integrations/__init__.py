"""Trainer, TRL, sentence-transformers and Accelerate on adapted models; none of them is imported:
their own classes and objects are handed in."""

from finespun.integrations.accelerate import keep_adapter
from finespun.integrations.trainer import trainer_class

__all__ = ["keep_adapter", "trainer_class"]
