"""``moejax generate``: a run's model continues a text, on a terminal as it is made."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from moejax.config import UserError, visible
from moejax.models.generate import Generated
from moejax.training import restore


def run(options: argparse.Namespace, say: Callable[[dict[str, Any], str], None]) -> int:
    """Generates what the flags ask for; ``say`` prints the result where it was not streamed.

    Raises:
      UserError: no run or checkpoint, or a flag out of range.
    """
    stream = options.stream
    if stream and (options.format != "text" or options.count != 1):
        raise UserError("--stream: prints one text as it is made; leave out --format and --count")
    if stream is None:
        stream = options.format == "text" and options.count == 1 and sys.stdout.isatty()
    found = restore.generate(
        options.workdir, options.prompt, tokens=options.tokens, seed=options.seed,
        count=options.count, stops=options.stop, speculate=options.speculate,
        show=show if stream else None, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, min_p=options.min_p,
    )  # fmt: skip
    if stream:
        print()
    else:
        result = {"text": found.texts[0], "texts": found.texts, "tokens": found.tokens}
        if found.accepted_share is not None:
            result["accepted_share"] = found.accepted_share
        say(result, "\n\n".join(found.texts))
    print(speed(found), file=sys.stderr)
    return 0


def show(piece: str) -> None:
    """Prints a piece of a text at once."""
    print(visible(piece), end="", flush=True)


def speed(found: Generated) -> str:
    """How fast it was, in a line."""
    line = (
        f"{found.tokens} tokens in {found.seconds:.2f} s, {found.tokens_per_second:.0f} tokens/s, "
        "without compilation"
    )
    if found.accepted_share is not None:
        line += f"; {found.accepted_share:.0%} of drafted tokens accepted"
    return line
