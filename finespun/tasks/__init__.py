"""What is learned: every task is one file, registered by its kind."""

from finespun.tasks.answer import AnswerPrompt
from finespun.tasks.classify import Classify, Regress
from finespun.tasks.task import TASKS, Task

__all__ = ["TASKS", "AnswerPrompt", "Classify", "Regress", "Task"]
