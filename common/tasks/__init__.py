"""What is learned: a task brings a model, its data and a loss. Importing this package imports no torch."""

from common.tasks.protocol import SHIPPED, Data, Task, TaskError, load_task

__all__ = ["SHIPPED", "Data", "Task", "TaskError", "load_task"]
