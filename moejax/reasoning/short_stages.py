"""Stages that train nothing: pairs by rule, rejection sampling to a data set, evaluation.

Each has a run's folder with a ledger, as any other run; a stage that was killed begins anew.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax

from moejax.config import UserError
from moejax.cost import counts, hardware
from moejax.cost.bill import summarize as read_bill
from moejax.cost.bill_text import format_ledger
from moejax.cost.ledger import Ledger
from moejax.data import tokenizers
from moejax.parallel import MeshConfig, make_mesh
from moejax.reasoning import templates
from moejax.reasoning.pairs_config import ShortConfig
from moejax.reasoning.policy_evaluation import ask_held_out
from moejax.reasoning.policy_setup import Asked
from moejax.reasoning.rewards import Scorer
from moejax.reasoning.rollouts import Asker, seeds_of
from moejax.reasoning.stage_run import Opened, run_stage
from moejax.reasoning.tasks import Problem, TaskSet
from moejax.training import prepare, restore, run_dir
from moejax.training.manifest import write_whole
from moejax.training.prepare import Billing
from moejax.training.signals import StopRequest

PAIRS, PREFERENCES, TEXT = "pairs.jsonl", "preferences.jsonl", "text.jsonl"
EVALUATIONS = "evaluations.json"


class ShortRun:
    """The work of one stage.

    Args:
      config: the stage.
      path: its folder.
      tasks: what is asked.
      asker: who is asked, with the model's variables; None for pairs by rule.
      ledger: is charged.
      stop: ends the work.
    """

    def __init__(
        self, config: ShortConfig, path: pathlib.Path, tasks: TaskSet,
        asker: tuple[Asker, dict[str, Any]] | None, ledger: Ledger, stop: StopRequest,
    ):  # fmt: skip
        self.config, self.path, self.tasks = config, path, tasks
        self.ledger, self.stop, self.asker = ledger, stop, asker
        if asker is not None:
            charged = lambda: ledger.phase("compile")
            self.asker = dataclasses.replace(asker[0], compile_in=charged), asker[1]
        self.template = templates.find(config.prompt.template)
        self.found: dict[str, Any] = {}

    def start(self) -> None:
        """Nothing: what is needed has been opened."""

    def train(self) -> str:
        """Does the work; returns the ledger's status."""
        with self.stop.at_once():
            work = {"pairs": self._pairs, "rejection": self._reject, "evaluation": self._evaluate}
            self.found = work[self.config.kind]()
        return "completed"

    def finish(self, status: str) -> str:
        """The status."""
        return status

    def close(self) -> None:
        """Nothing is left open."""

    def _pairs(self) -> dict[str, Any]:
        options, seed = self.config.pairs, self.config.seed
        lines = []
        for index in range(options.count):
            problem = self.tasks.problem(seed, index, "sft")
            solution = problem.solution if options.solutions else ""
            lines.append(self._line(problem, self.template.completion(problem.answer, solution)))
        if options.text:
            said = [json.loads(line) for line in lines]
            documents = [json.dumps({"text": pair["prompt"] + pair["completion"]}) for pair in said]
            write_whole(self.path / TEXT, "".join(line + "\n" for line in documents))
        return self._written(lines)

    def _line(self, problem: Problem, completion: str) -> str:
        return json.dumps({
            "prompt": self.template.prompt(problem.prompt), "completion": completion,
            "task": problem.task, "difficulty": problem.difficulty,
        })  # fmt: skip

    def _written(self, lines: list[str], name: str = PAIRS) -> dict[str, Any]:
        text = "".join(line + "\n" for line in lines)
        write_whole(self.path / name, text)
        return {"pairs": len(lines), "different": len({*lines}),
                "sha256": hashlib.sha256(text.encode()).hexdigest()}  # fmt: skip

    def _reject(self) -> dict[str, Any]:
        """Asks, and keeps the shortest of the right answers."""
        options = self.config.rejection
        asked, answers, right = self._answers()
        lines, preferred = [], []
        for i, judged in sorted(answers.items()):
            good = judged[True]
            bad = {text: n for text, n in judged[False].items() if text not in good}
            best = sorted(good, key=lambda text: (good[text], text))[: options.keep]
            worst = sorted(bad, key=lambda text: (-bad[text], text))
            lines += [self._line(asked[i], text) for text in best]
            prompt = self.template.prompt(asked[i].prompt)
            preferred += [
                json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected})
                for chosen, rejected in zip(best, worst, strict=False)
            ]
        count = options.questions * options.samples
        if not lines:
            raise UserError(
                f"of {count} answers none reached rejection.reward = {options.reward}; start "
                "from a better model, or lower it"
            )
        if options.preferences and not preferred:
            raise UserError(
                f"rejection.preferences: no question of {options.questions} has a right and a "
                "wrong answer; take more samples"
            )
        found = self._written(lines) | {"asked": count, "right": right}
        if options.preferences:
            found["preferences"] = self._written(preferred, PREFERENCES)
        return found

    def _answers(
        self,
    ) -> tuple[list[Problem], dict[int, dict[bool, dict[str, int]]], int]:
        """What was asked; by question its right and its wrong answers, each once with its tokens;
        and how many were right."""
        options, seed = self.config.rejection, self.config.seed
        asker, variables = self.asker
        scorer = Scorer(self.config.reward, self.template, self.tasks.verify)
        asked = [self.tasks.problem(seed, i, "sft") for i in range(options.questions)]
        queue = [(i, p) for i, p in enumerate(asked) for _ in range(options.samples)]
        answers = collections.defaultdict(lambda: {True: {}, False: {}})
        seeds, right = seeds_of(seed, 2, count=len(queue) + options.batch), 0
        for start in range(0, len(queue), options.batch):
            part = queue[start : start + options.batch]
            filled = part + queue[: options.batch - len(part)]
            while len(filled) < options.batch:
                filled += queue[: options.batch - len(filled)]
            with self.ledger.phase("rollout"):
                problems = [problem for _, problem in filled]
                found = asker.ask(variables, problems, seeds[start : start + options.batch])
                found = jax.device_get(found)
                texts = asker.texts(found)[: len(part)]
            self._charge(found)
            lengths = found.lengths - found.prompt_lengths
            for (i, problem), text, length in zip(part, texts, lengths[: len(part)], strict=True):
                reward = scorer.score(problem, text, int(length))
                good = not reward.parsed.fault and reward.total >= options.reward
                right += good
                if text:  # a stop token alone teaches nothing
                    answers[i][good][text] = int(length)
        return asked, answers, right

    def _evaluate(self) -> dict[str, Any]:
        asker, variables = self.asker
        config = self.config.evaluation
        batch = min(256, config.problems * config.samples)
        with self.ledger.phase("eval"):
            found = ask_held_out(asker, variables, self.tasks, config, batch)
        told = {"step": 0, **found.to_dict(), "correct": found.correct.astype(int).tolist()}
        write_whole(self.path / EVALUATIONS, json.dumps({"0": told}, indent=1) + "\n")
        self._charge_tokens(found.tokens)
        return {key: value for key, value in told.items() if key != "correct"}

    def _charge(self, found: Any) -> None:
        self._charge_tokens(int((found.lengths - 1).sum()))

    def _charge_tokens(self, tokens: int) -> None:
        model, width = self.asker[0].model, self.asker[0].prompt_tokens
        length = width + self.asker[0].options.max_tokens
        self.ledger.add_rollout(
            tokens, tokens * counts.count(model, length).flops_per_token.forward
        )


def do_stage(
    config: ShortConfig,
    workdir: str,
    *,
    bill_process: bool = False,
    resume_from: int | None = None,
) -> dict[str, Any]:
    """Does a stage's work, or finds it done.

    Args:
      config: the stage.
      workdir: its folder.
      bill_process: charge the time since this process began as start-up.
      resume_from: refused.

    Returns:
      What ``summary.json`` holds.

    Raises:
      UserError: a config or folder that cannot be used; nothing has been written then.
      RunFailed: the work stopped on an error.
    """
    if resume_from is not None:
        raise UserError(f"--resume-from = {resume_from}: a stage {config.kind!r} has no steps")

    def opened(path: pathlib.Path) -> Opened:
        tasks, asked, asker = _opened(config)
        directory, mesh = run_dir.open_run(path, config, asked), make_mesh(MeshConfig())
        make = lambda ledger, stop: ShortRun(config, path, tasks, asker, ledger, stop)

        def summarize(run: ShortRun, status: str) -> dict[str, Any]:
            ledger = run.ledger
            return {
                "status": status, "kind": config.kind, "step": 0, "tokens": 0, "loss": None,
                **run.found, "seconds": ledger.seconds, "dollars": ledger.total_dollars,
                "rollout_flops": ledger.rollout_flops,
                "fingerprint": directory.record["fingerprint"],
            }  # fmt: skip

        return Opened(directory, asked, config, _billing(config, mesh), mesh, make, summarize)

    return run_stage(opened, workdir, bill_process)


def _opened(
    config: ShortConfig,
) -> tuple[TaskSet, Asked, tuple[Asker, dict[str, Any]] | None]:
    """The tasks, their account for the record, and who is asked."""
    tasks, template = TaskSet(config.task), templates.find(config.prompt.template)
    tasks.problem(config.seed, 0, "sft")
    tokenizer: tokenizers.Tokenizer = tokenizers.BytesTokenizer()
    asker = None
    if config.kind != "pairs":
        prepare.use_compilation_cache(config.data.cache_path / "xla")
        run, variables = restore.load(config.start.run)
        tokenizer = tokenizers.load_saved(pathlib.Path(config.start.run) / run_dir.TOKENIZER)
        templates.check_vocabulary(template, tokenizer, tasks.characters, run.model.vocab_size)
        asker = (
            Asker(run.model, tokenizer, template, config.prompt_tokens, config.sampling),
            variables,
        )
    if config.evaluation is not None:
        tasks.distinct(config.evaluation.problems, config.evaluation.split, config.evaluation.seed)
    record = {"source": "tasks", "task": dataclasses.asdict(config.task)}
    told = json.dumps([record, config.prompt.template, tokenizer.fingerprint], sort_keys=True)
    return tasks, Asked(tokenizer, hashlib.sha256(told.encode()).hexdigest(), record), asker


def _billing(config: ShortConfig, mesh: jax.sharding.Mesh) -> Billing:
    device = mesh.devices.flat[0]
    name = config.cost.hardware
    if name == "auto":
        name = hardware.detect(device.platform, device.device_kind)
    devices = hardware.cpu_cores() if name == "cpu" else mesh.size
    peak, source = hardware.peak_flops(name, devices)
    return Billing(name, devices, config.cost.rate(name), peak, source, 0.0)


def show(summary: dict[str, Any], workdir: str) -> str:
    """The results and the bill, as text for people."""
    lines = [f"\nstage {summary['kind']} {summary['status']}"]
    if "pairs" in summary:
        asked = f", of {summary['right']} right in {summary['asked']}" if "asked" in summary else ""
        lines.append(
            f"  {summary['pairs']} pairs{asked}, {summary['different']} different: "
            f"{pathlib.Path(workdir) / PAIRS}"
        )
    if "pass_at" in summary:
        rate = summary["pass_at"]["1"]
        low, high = rate["interval"]
        lines.append(
            f"  pass@1 {rate['mean']:.3f} ({low:.3f} to {high:.3f}) on {summary['problems']} "
            f"held-out problems, {summary['samples']} answers each; in form "
            f"{summary['formed']:.3f}; {summary['response_tokens']:.1f} tokens an answer"
        )
    return "\n".join([*lines, "\nthe bill", format_ledger(read_bill([workdir]))])
