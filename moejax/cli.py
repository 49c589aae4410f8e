"""The command line: sub-commands, nothing else; see ``cli_flags`` for the longer lists of flags."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from moejax import cli_flags as flags
from moejax.config import UserError, visible
from moejax.host_memory import keep_freed_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns 0, 2 for a user's mistake or 1 for a run that failed."""
    keep_freed_memory()
    arguments = list(sys.argv[1:] if argv is None else argv)
    # --config.a.b=VALUE settings are taken out before argparse, which cannot know their names.
    # What stands after ``--`` is the command line of what ``launch`` starts.
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    overrides = [a.removeprefix("--config.") for a in own if a.startswith("--config.")]
    parser = parser_of_commands()
    options = parser.parse_args([a for a in own if not a.startswith("--config.")])
    options.rest = arguments[len(own) + 1 :]
    if options.rest and options.command != "launch":
        parser.error("-- is for moejax launch")
    options.overrides = overrides
    options.arguments = arguments
    alone = getattr(options, "overrides_alone", False)
    if overrides and not (alone or getattr(options, "config", None)):
        parser.error("--config.FIELD=VALUE needs --config=FILE")
    try:
        return options.run(options)
    except UserError as error:
        print(f"moejax {options.command}: {error}", file=sys.stderr)
        return 2
    except RecursionError:  # of a JSON file, which the parser went down into
        print(f"moejax {options.command}: a file is nested too deeply; restore it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"moejax {options.command}: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 1


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists what there is\n")


def parser_of_commands() -> argparse.ArgumentParser:
    """What reads a command line."""
    parser = _Parser(
        prog="moejax", description="Cost-efficient Mixture-of-Experts training, with its bill."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str, config: bool | None = None):
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run=run)
        if config is not None:
            text = "Python file with get_config(); --config.FIELD=VALUE changes a field"
            sub.add_argument("--config", metavar="FILE", required=config, help=text)
        return sub

    train = command("train", _train, "train a model, or go on with a run", config=True)
    flags.train_flags(train)

    summary = "train with several processes of this machine, and watch over them"
    flags.launch_flags(command("launch", _launch, summary))

    flags.plan_flags(command("plan", _plan, "the bill before a run", config=False))

    ledger = command("ledger", _ledger, "what runs cost")
    ledger.add_argument("directories", nargs="+", metavar="DIR", help="run folders, or folders of")
    flags.format_flag(ledger)

    summary = "variants at equal budgets, over seeds"
    flags.ablate_flags(command("ablate", _ablate, summary, config=True))

    tokenize = command("tokenize", _tokenize, "write a corpus as tokenised shards", config=True)
    tokenize.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    flags.format_flag(tokenize)

    flags.generate_flags(command("generate", _generate, "continue a text with a trained model"))

    inspect = command("inspect", _inspect, "what a trained model's routers do with held-out text")
    inspect.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    inspect.add_argument("--step", type=int, help="checkpoint; the newest if left out")
    inspect.add_argument("--batches", type=int, default=8, help="held-out batches to run")
    inspect.add_argument("--output", metavar="DIR", help="folder for inspect.json and the figures; "
                         "inspect in the run's folder if left out")  # fmt: skip
    flags.format_flag(inspect)
    summary = "what a trained model makes of held-out text by domain, and of other tasks"
    flags.evaluate_flags(command("evaluate", _evaluate, summary))
    summary = "one HTML file on a run, several, or an ablation"
    flags.report_flags(command("report", _report, summary))
    summary = "a run from a Hugging Face checkpoint"
    flags.import_flags(command("import", _import, summary, config=False))
    flags.export_flags(command("export", _export, "a run's model as a Hugging Face checkpoint"))
    summary = "a run of an MoE model from a dense run, with the same outputs at first"
    flags.upcycle_flags(command("upcycle", _upcycle, summary, config=False))
    flags.bench_flags(
        command("bench", _bench, "measure speed beside what it is to be compared with")
    )
    return parser


def _print(options: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    # JSON has no control characters; in a text they would be orders to the terminal.
    print(json.dumps(result) if options.format == "json" else visible(text))


def _train(options: argparse.Namespace) -> int:
    from moejax.training import train_command

    def stage_of(values: dict[str, Any]) -> train_command.Stage | None:
        from moejax.training import run_config

        if not values.keys() & run_config.OTHER_STAGES:
            return None
        from moejax.reasoning import stages  # the other runs need none of it

        return stages.stage_of(values)

    return train_command.run(options, lambda result, text: _print(options, result, text), stage_of)


def _launch(options: argparse.Namespace) -> int:
    from moejax.launch import command

    return command.launch(options)


def _plan(options: argparse.Namespace) -> int:
    from moejax.cost.budget_text import format_budget_plan
    from moejax.cost.compare import format_compare
    from moejax.cost.plan_text import format_plan
    from moejax.cost.published.table import format_published
    from moejax.cost.serving_plan import format_serving
    from moejax.training import plan_command
    from moejax.training.lowering import LoweringFailed

    try:
        plan = plan_command.plan(options)
    except LoweringFailed as error:
        print(f"moejax plan: {error}", file=sys.stderr)
        return 1
    forms = (
        (options.serve, format_serving),
        (options.published, format_published),
        (options.budget, format_budget_plan),
        (options.compare, format_compare),
    )
    show = next((form for flag, form in forms if flag is not None), format_plan)
    _print(options, plan, show(plan))
    return 0


def _ledger(options: argparse.Namespace) -> int:
    from moejax.cost.bill import summarize
    from moejax.cost.bill_text import format_ledger

    summary = summarize(options.directories)
    _print(options, summary, format_ledger(summary))
    return 0


def _ablate(options: argparse.Namespace) -> int:
    import shlex

    from moejax.ablation import run, spec, text

    outcome = run.ablate(
        spec.load(options.config, options.overrides), options.workdir,
        processes=options.processes, dry_run=options.dry_run, bill_process=True,
        command=shlex.join(["moejax", *options.arguments]),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    _print(options, outcome, "" if options.dry_run else text.format_outcome(outcome))
    return 0 if outcome["status"] in ("planned", "completed") else 1


def _tokenize(options: argparse.Namespace) -> int:
    from moejax.data import pretokenize
    from moejax.training import run_config

    config = run_config.load(options.config, options.overrides)
    say = lambda line: print(line, file=sys.stderr)
    result = pretokenize.tokenize_corpus(config.data, options.out, report=say)
    _print(options, result, pretokenize.format_result(result))
    return 0


def _generate(options: argparse.Namespace) -> int:
    from moejax.training import generate_command

    return generate_command.run(options, lambda result, text: _print(options, result, text))


def _import(options: argparse.Namespace) -> int:
    from moejax.training import import_command

    result = import_command.import_checkpoint(
        options.hf, options.workdir, options.config, options.overrides
    )
    _print(options, result, import_command.format_import(result))
    return 0


def _export(options: argparse.Namespace) -> int:
    from moejax.training import export_command

    result = export_command.export_checkpoint(
        options.workdir, options.hf, family=options.family, dtype=options.dtype
    )
    _print(options, result, export_command.format_export(result))
    return 0


def _upcycle(options: argparse.Namespace) -> int:
    from moejax.training import upcycle_command

    result = upcycle_command.upcycle_run(
        options.workdir, options.out, options.config, options.overrides, every=options.every,
        router_std=options.router_std, noise=options.noise,
    )  # fmt: skip
    _print(options, result, upcycle_command.format_upcycle(result))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from moejax.analysis.inspect import inspect
    from moejax.analysis.inspect_text import format_inspection

    result = inspect(
        options.workdir, step=options.step, batches=options.batches, output=options.output
    )
    _print(options, result, format_inspection(result))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from moejax.analysis.evaluate import evaluate
    from moejax.analysis.evaluate_text import format_evaluation

    result = evaluate(
        options.workdir, step=options.step, batches=options.batches, output=options.output,
        lm_eval=options.lm_eval, limit=options.limit,
    )  # fmt: skip
    _print(options, result, format_evaluation(result))
    return 0


def _report(options: argparse.Namespace) -> int:
    from moejax.analysis.report import command

    result = command.report(
        options.directories, output=options.output, figures=options.figures, inspect=options.inspect
    )
    _print(options, result, command.format_report(result))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from moejax.bench import command
    from moejax.bench.tables import format_tables

    record = command.run(options)
    _print(options, record, format_tables(record))
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
