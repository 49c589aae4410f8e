"""A policy asked held-out problems: pass@1, pass@k, majority@n, with intervals."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.reasoning.evaluate import Evaluation, evaluate
from moejax.reasoning.policy_config import EvaluationConfig
from moejax.reasoning.rollouts import Asker, seeds_of
from moejax.reasoning.tasks import TaskSet

SHOWN = 4  # samples that are kept to be read


@dataclasses.dataclass(frozen=True)
class Asked:
    """What an evaluation found.

    Attributes:
      measures: over problems.
      correct: whether each answer is right, (problems, samples).
      formed: share of the answers in the right form.
      tokens_mean: tokens of an answer, on average.
      tokens: that the sampler ran, prompts included.
      shown: some questions with their first answer.
    """

    measures: Evaluation
    correct: np.ndarray
    formed: float
    tokens_mean: float
    tokens: int
    shown: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: of the measures their means, intervals and counts."""
        found = self.measures
        one = lambda measure: {"mean": measure.mean, "interval": list(measure.interval)}
        return {
            "problems": found.problems,
            "samples": found.samples,
            "pass_at": {str(k): one(measure) for k, measure in found.pass_at.items()},
            "majority": one(found.majority),
            "by_difficulty": {str(d): one(m) for d, m in found.by_difficulty.items()},
            "formed": self.formed,
            "response_tokens": self.tokens_mean,
            "shown": self.shown,
        }


def ask_held_out(
    asker: Asker,
    variables: Any,
    tasks: TaskSet,
    config: EvaluationConfig,
    batch: int,
    place: Callable[[Any], Any] = jnp.asarray,
) -> Asked:
    """Asks a model the config's problems, ``batch`` answers at a time.

    Args:
      asker: the model and its form.
      variables: parameters and router state.
      tasks: what is asked.
      config: how many, and which.
      batch: answers sampled at once; the last batch is filled up with repetitions.
      place: puts rows on the devices.

    Raises:
      UserError: the tasks have not so many different problems.
    """
    problems = tasks.distinct(config.problems, config.split, config.seed)
    options = dataclasses.replace(asker.options, temperature=config.temperature)
    asker = dataclasses.replace(asker, options=options)
    queue = [problem for problem in problems for _ in range(config.samples)]
    seeds = seeds_of(config.seed, 1, count=len(queue))
    texts, lengths, tokens = [], [], 0
    for start in range(0, len(queue), batch):
        index = np.arange(start, start + batch) % len(queue)
        found = asker.ask(variables, [queue[i] for i in index], seeds[index], place=place)
        found = jax.device_get(found.replace(experts=None))
        count = min(batch, len(queue) - start)
        texts += asker.texts(found)[:count]
        lengths += (found.lengths - found.prompt_lengths)[:count].tolist()
        tokens += int((found.lengths - 1).sum())
    parsed = [asker.template.parse(text) for text in texts]
    right, votes = [], []
    for problem, read in zip(queue, parsed, strict=True):
        answer = read.answer
        right.append(answer is not None and tasks.verify(problem, answer))
        votes.append(None if answer is None else tasks.canonical(problem, answer))
    shape = (config.problems, config.samples)
    correct = np.array(right, bool).reshape(shape)
    rows = [votes[i : i + config.samples] for i in range(0, len(votes), config.samples)]
    measures = evaluate(
        correct, rows, [problem.difficulty for problem in problems], config.ks, seed=config.seed
    )
    shown = [
        {"prompt": problem.prompt, "answer": problem.answer, "said": texts[i * config.samples],
         "right": bool(correct[i, 0])}
        for i, problem in enumerate(problems[:SHOWN])
    ]  # fmt: skip
    formed = float(np.mean([not read.fault for read in parsed]))
    return Asked(measures, correct, formed, float(np.mean(lengths)), tokens, shown)
