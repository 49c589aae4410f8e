"""Tasks with verifiable answers, made by rule or read from data sets.

task        Problem, the Task interface, and how instances are held out
draws       random draws that are the same everywhere
numbers     numbers and expressions read from untrusted text
arithmetic, chains, countdown, algebra, lists, boolean, knights     tasks by rule
"""

from moejax.reasoning.tasks.algebra import Linear
from moejax.reasoning.tasks.arithmetic import Addition, Multiplication, Subtraction
from moejax.reasoning.tasks.boolean import Boolean
from moejax.reasoning.tasks.chains import Chain
from moejax.reasoning.tasks.countdown import Countdown
from moejax.reasoning.tasks.knights import Knights
from moejax.reasoning.tasks.lists import Copy, Sort
from moejax.reasoning.tasks.task import SPLITS, Problem, RuleTask, Task, split_of

_TASKS = (
    Addition, Subtraction, Multiplication, Chain, Countdown, Linear, Sort, Copy, Boolean, Knights,
)  # fmt: skip
TASKS: dict[str, RuleTask] = {task.name: task() for task in _TASKS}

__all__ = ["SPLITS", "TASKS", "Problem", "RuleTask", "Task", "split_of"]
