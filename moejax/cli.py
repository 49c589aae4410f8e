"""The command line: flags and sub-commands, nothing else."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from moejax.config import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns 0, 2 for a user's mistake or 1 for a run that failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # --config.a.b=VALUE settings are taken out before argparse, which cannot know their names.
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    parser = _parser()
    options = parser.parse_args([a for a in arguments if not a.startswith("--config.")])
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


def _parser() -> argparse.ArgumentParser:
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
    train.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    _format(train)

    _plan_flags(command("plan", _plan, "the bill before a run", config=False))

    ledger = command("ledger", _ledger, "what runs cost")
    ledger.add_argument("directories", nargs="+", metavar="DIR", help="run folders, or folders of")
    _format(ledger)

    _ablate_flags(command("ablate", _ablate, "variants at equal budgets, over seeds", config=True))

    tokenize = command("tokenize", _tokenize, "write a corpus as tokenised shards", config=True)
    tokenize.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    _format(tokenize)

    generate = command("generate", _generate, "continue a text with a trained model")
    generate.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    generate.add_argument("--prompt", default="", metavar="TEXT")
    generate.add_argument("--tokens", type=int, default=200, help="tokens to add at most")
    generate.add_argument("--temperature", type=float, default=0.8)
    generate.add_argument("--seed", type=int, default=0)
    _format(generate)

    inspect = command("inspect", _inspect, "what a trained model's routers do with held-out text")
    inspect.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    inspect.add_argument("--step", type=int, help="checkpoint; the newest if left out")
    inspect.add_argument("--batches", type=int, default=8, help="held-out batches to run")
    inspect.add_argument("--output", metavar="DIR", help="folder for inspect.json and the figures; "
                         "inspect in the run's folder if left out")  # fmt: skip
    _format(inspect)
    _hugging_face_flags(command)
    summary = "a run of an MoE model from a dense run, with the same outputs at first"
    _upcycle_flags(command("upcycle", _upcycle, summary, config=False))
    _bench_flags(command("bench", _bench, "measure speed beside what it is to be compared with"))
    return parser


def _ablate_flags(ablate: argparse.ArgumentParser) -> None:
    ablate.add_argument("--workdir", required=True, metavar="DIR", help="the ablation's folder; "
                        "the same command goes on with what is missing")  # fmt: skip
    ablate.add_argument("--dry-run", action="store_true", help="the plan and its bill, no more")
    ablate.add_argument("--processes", type=int, default=0, metavar="N", help="cells at once, each "
                        "a process on its share of the machine; one after another in this one if "
                        "left out")  # fmt: skip
    _format(ablate)


def _hugging_face_flags(command: Callable[..., argparse.ArgumentParser]) -> None:
    add = command("import", _import, "a run from a Hugging Face checkpoint", config=False)
    add.set_defaults(overrides_alone=True)
    add.add_argument("--hf", required=True, metavar="DIR", help="config.json and safetensors")
    add.add_argument("--workdir", required=True, metavar="DIR", help="folder for the run")
    _format(add)
    export = command("export", _export, "a run's model as a Hugging Face checkpoint")
    export.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    export.add_argument("--hf", required=True, metavar="DIR", help="folder for the checkpoint")
    export.add_argument("--family", metavar="NAME", help="model_type to write, llama or mixtral "
                        "...; found if left out")  # fmt: skip
    export.add_argument("--dtype", help="float32, bfloat16 or float16; that of the imported "
                        "checkpoint if left out")  # fmt: skip
    _format(export)


def _upcycle_flags(upcycle: argparse.ArgumentParser) -> None:
    upcycle.set_defaults(overrides_alone=True)
    upcycle.add_argument("--workdir", required=True, metavar="DIR", help="the dense run's folder")
    upcycle.add_argument("--out", required=True, metavar="DIR", help="folder for the new run")
    upcycle.add_argument("--every", type=int, default=1, metavar="N", help="of the layers after "
                         "model.first_k_dense, every n-th gets experts")  # fmt: skip
    upcycle.add_argument("--router-std", type=float, default=0.0, help="deviation of the routers' "
                         "weights; by the kind of gates if left out")  # fmt: skip
    upcycle.add_argument("--noise", type=float, default=0.0, help="on the experts' matrices, over "
                         "their deviation; 0 keeps the dense model's outputs")  # fmt: skip
    _format(upcycle)


def _plan_flags(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--model", metavar="NAME", help="a published model")
    plan.add_argument("--hf-config", metavar="FILE", help="a Hugging Face config.json")
    plan.add_argument("--tokens", type=float, help="tokens to train on")
    plan.add_argument("--seq-len", type=int, help="positions of a sequence")
    plan.add_argument("--hardware", metavar="CHIP", help="h100_sxm, h800_sxm, cpu ...")
    plan.add_argument("--devices", type=int, help="how many; cores on a CPU")
    plan.add_argument("--price-kind", metavar="KIND", help="spot, reserved, owned ... of the book")
    plan.add_argument(
        "--price-book", metavar="FILE.yaml", help="prices of your own, which go first"
    )
    plan.add_argument("--price", type=float, help="dollars per device-hour")
    plan.add_argument("--region", help="whose grid the carbon is counted by: world, usa, china ...")
    plan.add_argument("--mfu", type=float, help="utilisation to assume, 0 to 1")
    plan.add_argument("--measured", metavar="DIR", action="append",
                      help="take the utilisation from a run of yours; may be repeated")  # fmt: skip
    plan.add_argument("--exchange", metavar="NAME", help="how tokens reach experts on other "
                      "devices: moejax or deepseek_v3")  # fmt: skip
    plan.add_argument("--overlap", type=float, help="seconds of exchange that a second of "
                      "computation hides, 0 to 1")  # fmt: skip
    plan.add_argument("--expert-devices", type=int, help="devices that hold the experts")
    plan.add_argument("--compare", metavar="CHIP,CHIP", help="a table of the same training on "
                      "several chips")  # fmt: skip
    plan.add_argument("--serve", type=float, metavar="TOKENS_PER_S", help="the bill of a "
                      "deployment instead, from the output tokens/s of a device")  # fmt: skip
    plan.add_argument("--list-price", metavar="PRICE", help="with --serve: a model, or dollars for "
                      "a million tokens, to break even against")  # fmt: skip
    plan.add_argument("--input-per-output", type=float, help="with --list-price: input tokens for "
                      "each output token")  # fmt: skip
    plan.add_argument("--cache-hit-share", type=float, help="with --list-price: share of the input "
                      "that is cached")  # fmt: skip
    plan.add_argument("--published", metavar="NAME", nargs="?", const="all",
                      help="bills that others published, rebuilt: all of them, one, or a FILE.py "
                      "with get_bill()")  # fmt: skip
    plan.add_argument("--budget", metavar="AMOUNT", help="turn the plan round: which model for "
                      "'$100k', 100kUSD or 1e22FLOP, by published scaling laws")  # fmt: skip
    plan.add_argument("--law", metavar="NAME", help="with --budget: the law whose model is planned")
    plan.add_argument("--output", metavar="FILE.py", help="with --budget: the model as a config")
    _format(plan)


def _bench_flags(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--suite", default="moe", help="moe, model, routers, agreement, attention, "
                       "ceilings")  # fmt: skip
    bench.add_argument("--shapes", metavar="NAME,NAME", help="or spelled out: T64-D16-F8-E4-K2")
    bench.add_argument("--loads", metavar="LOAD,LOAD", help="balanced, skewed, worst; of a model "
                       "also untrained and recorded")  # fmt: skip
    bench.add_argument("--trace", metavar="FILE", help="loads to replay, a run's metrics.jsonl")
    bench.add_argument("--dispatch", metavar="NAME,NAME", help="all that can run here if left out")
    bench.add_argument("--routers", metavar="NAME,NAME", help="of --suite=routers; all if left out")
    bench.add_argument("--dtype", help="float32 or bfloat16; by platform if left out")
    bench.add_argument("--seconds", type=float, help="time for each candidate; 1 if left out")
    bench.add_argument("--repeats", type=int, help="so many rounds instead")
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--profile", action="store_true", help="the parts of a layer, and a trace")
    bench.add_argument("--against", metavar="PEER", help="transformers: needs moejax[parity]")
    bench.add_argument("--tune", action="store_true", help="tune the GPU kernels, nothing else")
    bench.add_argument("--output", metavar="DIR", help="folder for results.json and README.md")
    _format(bench)


def _format(parser: argparse.ArgumentParser) -> None:
    text = "json prints one object on standard output"
    parser.add_argument("--format", choices=("text", "json"), default="text", help=text)


def _print(options: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    print(json.dumps(result) if options.format == "json" else text)


def _train(options: argparse.Namespace) -> int:
    from moejax.analysis.curves import loss_over_dollars
    from moejax.training import report, run_config
    from moejax.training.loop import RunFailed
    from moejax.training.train import train

    try:
        config = run_config.load(options.config, options.overrides)
        summary = train(config, options.workdir, bill_process=True)
        loss_over_dollars(options.workdir)
    except RunFailed as error:
        print(f"moejax train: the run failed: {error}", file=sys.stderr)
        return 1
    _print(options, summary, report.format_summary(summary, options.workdir))
    return 1 if summary["status"] == "interrupted" else 0


def _plan(options: argparse.Namespace) -> int:
    from moejax.cost.budget_text import format_budget_plan
    from moejax.cost.compare import format_compare
    from moejax.cost.plan_text import format_plan
    from moejax.cost.published.table import format_published
    from moejax.cost.serving_plan import format_serving
    from moejax.training import plan_command

    plan = plan_command.plan(options)
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
    from moejax.training import restore

    text = restore.generate(
        options.workdir, options.prompt, tokens=options.tokens, seed=options.seed,
        temperature=options.temperature,
    )  # fmt: skip
    _print(options, {"text": text}, text)
    return 0


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


def _bench(options: argparse.Namespace) -> int:
    from moejax.bench import command
    from moejax.bench.tables import format_tables

    record = command.run(options)
    _print(options, record, format_tables(record))
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
