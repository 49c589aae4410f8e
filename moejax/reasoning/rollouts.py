"""Rollouts: questions asked, answers sampled and judged, and rows to train on made of them.

A rollout is a pure function of the run's config, the number of the step and the policy, so a run
that is resumed asks and answers as one that never stopped.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from moejax.config import UserError
from moejax.data.tokenizers import Tokenizer
from moejax.models import ModelConfig
from moejax.models.decode import Sampled, checked_rules, sample_program
from moejax.models.sampling_config import SamplingConfig
from moejax.reasoning.advantages import group_advantages, keep_groups_with_spread, overlong_rewards
from moejax.reasoning.rewards import Reward, Scorer
from moejax.reasoning.rl_config import RLConfig
from moejax.reasoning.tasks import Problem, TaskSet
from moejax.reasoning.templates import Template

# Dynamic sampling asks so many times for as many questions; then groups without spread fill up.
MOST_ROUNDS = 8


@struct.dataclass
class PolicyRows:
    """Responses to train on; the leaves of ``experts`` have (repeats, B, S, K).

    Attributes:
      tokens: prompt and response, then zeros.
      lengths: tokens of both.
      mask: 1 where the next token is the response's.
      advantages: of each response.
      sampler: the sampler's log-probabilities of the next tokens.
      old: those of the policy before its update, by the trainer; None: the first update's own.
      reference: those of the reference; None without a KL term.
      experts: what routers are to replay; None where they choose.
    """

    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    mask: Float[Array, "B S"]
    advantages: Float[Array, " B"]
    sampler: Float[Array, "B S"]
    old: Float[Array, "B S"] | None = None
    reference: Float[Array, "B S"] | None = None
    experts: Any = None


@dataclasses.dataclass(frozen=True)
class Asker:
    """What is needed to ask a model questions in a text form, and to read its answers.

    Attributes:
      model: its config.
      tokenizer: the one it was trained with; its separator begins a prompt and ends an answer.
      template: the form.
      prompt_tokens: width that prompts are padded to, P.
      options: of the sampling.
      compile_in: opens what a compilation is charged to.
      programs: compiled ones, by the number of rows and whether experts are kept.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    template: Template
    prompt_tokens: int
    options: SamplingConfig
    compile_in: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    programs: dict[tuple[int, bool], Any] = dataclasses.field(default_factory=dict)

    def prompts(
        self, problems: Sequence[Problem]
    ) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, " B"]]:
        """Padded prompts and their lengths.

        Raises:
          UserError: a prompt is longer than there is room for.
        """
        rows = np.zeros((len(problems), self.prompt_tokens), np.int32)
        lengths = np.zeros(len(problems), np.int32)
        for row, problem in enumerate(problems):
            ids = self.tokenizer.encode(self.template.prompt(problem.prompt))
            ids = [self.tokenizer.separator, *map(int, ids)]
            if len(ids) > self.prompt_tokens:
                raise UserError(
                    f"train.seq_len leaves {self.prompt_tokens} tokens for a prompt, and that of "
                    f"{problem.prompt[:60]!r} has {len(ids)}; raise it, lower sampling.max_tokens, "
                    "or take a shorter template"
                )
            rows[row, : len(ids)], lengths[row] = ids, len(ids)
        return rows, lengths

    def ask(
        self,
        variables: Any,
        problems: Sequence[Problem],
        seeds: UInt32[np.ndarray, " B"],
        keep_experts: bool = False,
        place: Callable[[Any], Any] = jnp.asarray,
    ) -> Sampled:
        """One answer to each of the problems.

        Args:
          variables: parameters and router state.
          problems: repeated where several answers are wanted.
          seeds: of each answer.
          keep_experts: whether the chosen experts are kept.
          place: puts rows on the devices.
        """
        rows, lengths = self.prompts(problems)
        rows, lengths, seeds = place(rows), place(lengths), place(seeds)
        stops, ids = (self.tokenizer.separator,), self.tokenizer.vocab_size
        rules = checked_rules(self.model, rows, lengths, seeds, self.options, stops, ids)
        given = (variables, rows, lengths, rules)
        kind = (len(problems), keep_experts)
        if kind not in self.programs:
            how = dict(max_tokens=self.options.max_tokens, keep_experts=keep_experts)
            with self.compile_in():
                self.programs[kind] = sample_program.lower(self.model, *given, **how).compile()
        return self.programs[kind](*given)

    def texts(self, found: Sampled) -> list[str]:
        """The answers' text, without prompt and stop token; from host arrays."""
        texts = []
        for row, begin, end, ended in zip(
            found.tokens, found.prompt_lengths, found.lengths, found.finished, strict=True
        ):
            texts.append(self.tokenizer.decode(row[int(begin) : int(end) - bool(ended)].tolist()))
        return texts


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What a step asked and got.

    Attributes:
      rows: to train on, on the host but for ``experts``.
      rewards: of the responses that are trained on.
      texts: those responses.
      problems: the questions, one a response.
      tokens: that the sampler ran, of all rounds, prompts included.
      metrics: means over what was sampled.
    """

    rows: PolicyRows
    rewards: list[Reward]
    texts: list[str]
    problems: list[Problem]
    tokens: int
    metrics: dict[str, float]


def seeds_of(*numbers: int, count: int) -> UInt32[np.ndarray, " count"]:
    """Seeds that depend on the numbers alone."""
    return np.random.SeedSequence(numbers).generate_state(count)


class Roller:
    """Makes rollouts; ``reward_seconds`` is the time that judging took, of the phase ``rollout``.

    Args:
      asker: the model and its form.
      tasks: what is asked.
      scorer: what answers are worth.
      config: the algorithm, resolved.
      responses: of a rollout, B.
      seed: of questions and answers.
      enter: opens a phase of the bill by its name: ``rollout``.
      place: puts rows on the devices.
    """

    def __init__(
        self, asker: Asker, tasks: TaskSet, scorer: Scorer, config: RLConfig, responses: int,
        seed: int, enter: Callable[[str], Any], place: Callable[[Any], Any] = jnp.asarray,
    ):  # fmt: skip
        self.asker, self.tasks, self.scorer, self.config = asker, tasks, scorer, config
        self.responses, self.seed, self._enter, self._place = responses, seed, enter, place
        self.reward_seconds = 0.0

    def roll(self, variables: Any, step: int) -> Rollout:
        """The rollout of a step, counted from 0."""
        kept: list[Rollout] = []
        whole = self.config.dynamic_sampling
        for round_ in range(MOST_ROUNDS if whole else 1):
            kept.append(self._round(variables, step, round_))
            if sum(int(_spread(part, self.config).sum()) for part in kept) >= self.responses:
                break
        return _filled(kept, self.config, self.responses) if whole else kept[0]

    def _round(self, variables: Any, step: int, round_: int) -> Rollout:
        group = self.config.group_size
        count = self.responses // group
        first = (step * MOST_ROUNDS + round_) * count
        asked = [self.tasks.problem(self.seed, first + i, "rl") for i in range(count)]
        problems = [problem for problem in asked for _ in range(group)]
        seeds = seeds_of(self.seed, step, round_, count=len(problems))
        replay = self.config.routing_replay == "rollout"
        with self._enter("rollout"):
            found = self.asker.ask(variables, problems, seeds, replay, self._place)
            experts, found = found.experts, jax.device_get(found.replace(experts=None))
            began = time.monotonic()
            judged = self._judged(problems, found, experts)
            self.reward_seconds += time.monotonic() - began
        return judged

    def _judged(self, problems: list[Problem], found: Sampled, experts: Any) -> Rollout:
        group, longest = self.config.group_size, self.asker.options.max_tokens
        texts = self.asker.texts(found)
        own = found.lengths - found.prompt_lengths
        rewards: list[Reward] = []
        for i in range(0, len(problems), group):
            part = slice(i, i + group)
            rewards += self.scorer.group(problems[i], texts[part], own[part].tolist())
        totals = np.array([reward.total for reward in rewards], np.float32)
        over = overlong_rewards(
            own, longest, self.config.overlong_buffer, self.config.overlong_penalty
        )
        totals = totals + np.asarray(over)
        advantages = group_advantages(jnp.asarray(totals), group, self.config.advantage_std)
        target = np.arange(1, found.tokens.shape[1] + 1)[None]
        inside = (target >= found.prompt_lengths[:, None]) & (target < found.lengths[:, None])
        rows = PolicyRows(
            found.tokens, found.lengths, inside.astype(np.float32), np.asarray(advantages),
            found.log_probs, experts=experts,
        )  # fmt: skip
        mean = lambda values: float(np.mean(values))
        metrics = {
            "reward/mean": mean(totals),
            "reward/accuracy": mean([reward.accuracy for reward in rewards]),
            "reward/format": mean([reward.format for reward in rewards]),
            "reward/length": mean([reward.length for reward in rewards]),
            "response/tokens": mean(own),
            "response/longest": float(own.max()),
            "response/finished": mean(found.finished),
            "groups/without_spread": 1 - mean(_spread_of(totals, group)),
            "rounds": 1.0,
        }  # fmt: skip
        # The last token of a row is not run: nothing follows it.
        tokens = int((found.lengths - 1).sum())
        return Rollout(rows, rewards, texts, problems, tokens, metrics)


def _spread_of(rewards: Float[np.ndarray, " B"], group: int) -> np.ndarray:
    return np.asarray(keep_groups_with_spread(jnp.asarray(rewards), group).rows)


def _spread(part: Rollout, config: RLConfig) -> np.ndarray:
    """Which responses are of groups that are neither all right nor all wrong."""
    judged = [r.accuracy if r.own is None else r.own for r in part.rewards]
    return _spread_of(np.array(judged, np.float32), config.group_size)


def _filled(parts: list[Rollout], config: RLConfig, responses: int) -> Rollout:
    """Groups with spread of all rounds, as many as are trained on; where they are too few, others
    fill up, whose advantages are 0."""
    spread = np.concatenate([_spread(part, config) for part in parts])
    order = np.argsort(~spread, kind="stable")[:responses]
    join = lambda get: np.concatenate([np.asarray(get(part)) for part in parts])[order]
    take = lambda get: [value for part in parts for value in get(part)]
    rows = [part.rows for part in parts]
    experts = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves, axis=1)[:, order], *(r.experts for r in rows)
    )
    advantages = np.where(spread[order], join(lambda p: p.rows.advantages), 0.0)
    made = PolicyRows(
        join(lambda p: p.rows.tokens), join(lambda p: p.rows.lengths), join(lambda p: p.rows.mask),
        advantages.astype(np.float32), join(lambda p: p.rows.sampler), experts=experts,
    )  # fmt: skip
    metrics = {
        name: float(np.mean([part.metrics[name] for part in parts])) for name in parts[0].metrics
    }
    metrics |= {"rounds": float(len(parts)), "groups/filled_up": float(np.mean(~spread[order]))}
    pick = lambda values: [values[i] for i in order]
    return Rollout(
        made, pick(take(lambda p: p.rewards)), pick(take(lambda p: p.texts)),
        pick(take(lambda p: p.problems)), sum(part.tokens for part in parts), metrics,
    )  # fmt: skip
