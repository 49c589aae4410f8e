"""Tasks with verifiable answers, made by rule or read from data sets.

task        Problem, the Task interface, and how instances are held out
draws       random draws that are the same everywhere
numbers     numbers and expressions read from untrusted text
arithmetic, chains, countdown, algebra, lists, boolean, knights     tasks by rule
datasets    GSM8K, and a user's JSONL
gym         tasks of reasoning-gym, where it is installed
task_set    the config block ``task``, and the problems that it means
"""

from moejax.reasoning.tasks.task import SPLITS, Problem, RuleTask, Task, split_of
from moejax.reasoning.tasks.task_set import TASKS, TaskConfig, TaskSet

__all__ = ["SPLITS", "TASKS", "Problem", "RuleTask", "Task", "TaskConfig", "TaskSet", "split_of"]
