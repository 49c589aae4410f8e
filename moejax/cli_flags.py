"""The flags of the sub-commands that have many."""

import argparse


def train_flags(train: argparse.ArgumentParser) -> None:
    """``moejax train``."""
    train.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder; several "
                       "processes need it on a file system that they share")  # fmt: skip
    train.add_argument("--resume-from", type=int, metavar="STEP", help="go back to this step's "
                       "checkpoint, and give up the later ones; to go on from the newest, leave it "
                       "out")  # fmt: skip
    train.add_argument("--coordinator", metavar="HOST:PORT", help="one of several processes: where "
                       "process 0 listens; SLURM, Open MPI and Kubernetes tell it")  # fmt: skip
    train.add_argument("--process-id", type=int, metavar="I", help="with it: which, from 0")
    train.add_argument("--processes", type=int, metavar="N", help="with it: how many")
    format_flag(train)


def launch_flags(launch: argparse.ArgumentParser) -> None:
    """``moejax launch``."""
    launch.usage = "moejax launch --processes=P [...] -- train --config=FILE --workdir=DIR [...]"
    launch.add_argument("--processes", type=int, required=True, metavar="P")
    launch.add_argument("--devices-per-process", type=int, metavar="D", help="GPUs, or virtual "
                        "devices of a CPU; its share of the GPUs, or 1, if left out")  # fmt: skip
    launch.add_argument("--timeout-after-stall", type=float, default=45.0, metavar="SECONDS",
                        help="what a step may take before its process counts as stuck, or ten "
                        "times the longest so far; 45 if left out")  # fmt: skip


def ablate_flags(ablate: argparse.ArgumentParser) -> None:
    """``moejax ablate``."""
    ablate.add_argument("--workdir", required=True, metavar="DIR", help="the ablation's folder; "
                        "the same command goes on with what is missing")  # fmt: skip
    ablate.add_argument("--dry-run", action="store_true", help="the plan and its bill, no more")
    ablate.add_argument("--processes", type=int, default=0, metavar="N", help="cells at once, each "
                        "a process on its share of the machine; one after another in this one if "
                        "left out")  # fmt: skip
    format_flag(ablate)


def evaluate_flags(evaluate: argparse.ArgumentParser) -> None:
    """``moejax evaluate``."""
    evaluate.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    evaluate.add_argument("--step", type=int, help="checkpoint; the newest if left out")
    evaluate.add_argument("--batches", type=int, help="held-out batches to run, spread over the "
                          "text; all if left out")  # fmt: skip
    evaluate.add_argument("--lm-eval", metavar="TASK,TASK", help="tasks of lm-evaluation-harness, "
                          "or YAML files of your own; needs moejax[eval]")  # fmt: skip
    evaluate.add_argument("--limit", type=int, help="with --lm-eval: samples of each task")
    evaluate.add_argument("--output", metavar="DIR", help="folder for evaluate.json; the run's "
                          "folder if left out")  # fmt: skip
    format_flag(evaluate)


def report_flags(report: argparse.ArgumentParser) -> None:
    """``moejax report``."""
    report.add_argument("directories", nargs="+", metavar="DIR", help="a run's folder, an "
                        "ablation's, a folder of runs, or several")  # fmt: skip
    report.add_argument("--output", metavar="FILE.html", help="report.html in the folder if left "
                        "out, or here where there are several")  # fmt: skip
    report.add_argument("--figures", default="none", metavar="KIND,KIND", help="figures as files "
                        "beside the report, too: png, svg or none")  # fmt: skip
    report.add_argument("--inspect", action=argparse.BooleanOptionalAction, default=True,
                        help="measure the routers of a single run that moejax inspect has not "
                        "looked at yet")  # fmt: skip
    format_flag(report)


def import_flags(add: argparse.ArgumentParser) -> None:
    """``moejax import``."""
    add.set_defaults(overrides_alone=True)
    add.add_argument("--hf", required=True, metavar="DIR", help="config.json and safetensors")
    add.add_argument("--workdir", required=True, metavar="DIR", help="folder for the run")
    format_flag(add)


def export_flags(export: argparse.ArgumentParser) -> None:
    """``moejax export``."""
    export.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    export.add_argument("--hf", required=True, metavar="DIR", help="folder for the checkpoint")
    export.add_argument("--family", metavar="NAME", help="model_type to write, llama or mixtral "
                        "...; found if left out")  # fmt: skip
    export.add_argument("--dtype", help="float32, bfloat16 or float16; that of the imported "
                        "checkpoint if left out")  # fmt: skip
    format_flag(export)


def upcycle_flags(upcycle: argparse.ArgumentParser) -> None:
    """``moejax upcycle``."""
    upcycle.set_defaults(overrides_alone=True)
    upcycle.add_argument("--workdir", required=True, metavar="DIR", help="the dense run's folder")
    upcycle.add_argument("--out", required=True, metavar="DIR", help="folder for the new run")
    upcycle.add_argument("--every", type=int, default=1, metavar="N", help="of the layers after "
                         "model.first_k_dense, every n-th gets experts")  # fmt: skip
    upcycle.add_argument("--router-std", type=float, default=0.0, help="deviation of the routers' "
                         "weights; by the kind of gates if left out")  # fmt: skip
    upcycle.add_argument("--noise", type=float, default=0.0, help="on the experts' matrices, over "
                         "their deviation; 0 keeps the dense model's outputs")  # fmt: skip
    format_flag(upcycle)


def plan_flags(plan: argparse.ArgumentParser) -> None:
    """``moejax plan``."""
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
    plan.add_argument("--lower", action="store_true", default=None, help="also compile the "
                      "step for that many host devices: bytes, collectives, warnings")  # fmt: skip
    format_flag(plan)


def generate_flags(generate: argparse.ArgumentParser) -> None:
    """``moejax generate``."""
    generate.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    generate.add_argument("--prompt", default="", metavar="TEXT")
    generate.add_argument("--tokens", type=int, default=200, help="tokens to add at most")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    generate.add_argument("--top-k", type=int, default=0, help="draw from this many; 0 for all")
    generate.add_argument("--top-p", type=float, default=1.0, help="draw from this share")
    generate.add_argument("--min-p", type=float, default=0.0, help="least share of the likeliest")
    generate.add_argument("--count", type=int, default=1, help="so many texts")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT",
                          help="ends a text; may be given several times")  # fmt: skip
    generate.add_argument("--speculate", type=int, default=0, metavar="N",
                          help="tokens that the model's MTP module drafts at a time")  # fmt: skip
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--stream", action=argparse.BooleanOptionalAction, help="print text as "
                          "it is made; if left out, on a terminal only")  # fmt: skip
    format_flag(generate)


def bench_flags(bench: argparse.ArgumentParser) -> None:
    """``moejax bench``."""
    bench.add_argument("--suite", default="moe", help="moe, model, generate, routers, agreement, "
                       "attention, ceilings")  # fmt: skip
    bench.add_argument("--shapes", metavar="NAME,NAME", help="or spelled out: T64-D16-F8-E4-K2")
    bench.add_argument("--loads", metavar="LOAD,LOAD", help="balanced, skewed, worst; of a model "
                       "also untrained and recorded")  # fmt: skip
    bench.add_argument("--trace", metavar="FILE", help="loads to replay, a run's metrics.jsonl")
    bench.add_argument("--dispatch", metavar="NAME,NAME", help="all that can run here if left out")
    bench.add_argument("--routers", metavar="NAME,NAME", help="of --suite=routers; all if left out")
    bench.add_argument("--passes", metavar="PASS,PASS", help="forward, forward_backward, and of "
                       "a model train_step; all if left out")  # fmt: skip
    bench.add_argument("--dtype", help="float32 or bfloat16; by platform if left out")
    bench.add_argument("--seconds", type=float, help="time for each candidate; 1 if left out")
    bench.add_argument("--repeats", type=int, help="so many rounds instead")
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--profile", action="store_true", help="the parts of a layer, and a trace")
    bench.add_argument("--against", metavar="PEER", help="transformers: needs moejax[parity]")
    bench.add_argument("--tune", action="store_true", help="tune the GPU kernels, nothing else")
    bench.add_argument("--output", metavar="DIR", help="folder for results.json and README.md")
    format_flag(bench)


def format_flag(parser: argparse.ArgumentParser) -> None:
    """``--format``, which every sub-command with a result has."""
    text = "json prints one object on standard output"
    parser.add_argument("--format", choices=("text", "json"), default="text", help=text)
