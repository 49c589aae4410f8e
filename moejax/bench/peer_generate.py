"""The peer of suite ``generate``: OLMoE's weights in Transformers' ``generate``, as told on input.

Run as a script in a process of its own, by the protocol of ``peer_transformers``: settings in, what
was built out, then each ``"generate"`` is one completion of all prompts, answered by milliseconds.
"""

import json
import sys
import time
from typing import Any

EXPERTS = ("grouped_mm", "eager", "batched_mm")
# Tokens by which the implementations of experts are compared.
TRIAL = 8
# One that takes so many times the fastest's time is not tried twice.
SLOW = 3


def main() -> int:
    """Reads settings and steps from standard input until it ends; returns the exit status."""
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        peer = Peer(json.loads(sys.stdin.readline()))
        answer(peer.describe())
        for line in sys.stdin:
            asked = json.loads(line)
            if asked == "stop":
                break
            answer({"ms": peer.step(asked)})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


class Peer:
    """A model from a checkpoint, and a batch of prompts."""

    def __init__(self, settings: dict[str, Any]):
        """Loads the model and takes the fastest implementation of its experts.

        Args:
          settings: ``path``, ``prompts``, ``tokens``, ``device``, ``dtype`` and ``threads``.

        Raises:
          RuntimeError: no implementation of the experts runs here.
        """
        import torch
        from transformers import OlmoeForCausalLM

        self.torch, self.device, self.tokens = torch, settings["device"], settings["tokens"]
        torch.set_num_threads(settings["threads"])
        dtype = getattr(torch, settings["dtype"])
        model = OlmoeForCausalLM.from_pretrained(settings["path"], dtype=dtype)
        self.model = model.to(self.device).eval()
        self.prompts = torch.tensor(settings["prompts"]).to(self.device)
        self.tried = {}
        for name in EXPERTS:
            try:
                self.model.set_experts_implementation(name)
                self.tried[name] = self._timed(TRIAL)
                if self.tried[name] < SLOW * min(self.tried.values()):  # the first warms up
                    self.tried[name] = self._timed(TRIAL)
            except (ValueError, RuntimeError, NotImplementedError, ImportError) as error:
                print(f"{name}: {error}", file=sys.stderr)
        if not self.tried:
            raise RuntimeError("no implementation of the experts runs here")
        self.experts = min(self.tried, key=self.tried.get)
        self.model.set_experts_implementation(self.experts)

    def complete(self, tokens: int) -> Any:
        """Greedy completions, all of that many tokens, by the model's KV cache."""
        with self.torch.inference_mode():
            found = self.model.generate(
                self.prompts, attention_mask=self.torch.ones_like(self.prompts), do_sample=False,
                max_new_tokens=tokens, min_new_tokens=tokens, use_cache=True, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return found[:, self.prompts.shape[1] :]

    def describe(self) -> dict[str, Any]:
        """What was built, the times of the experts' implementations, and a completion."""
        import transformers

        return {
            "ready": True,
            "params": sum(p.numel() for p in self.model.parameters()),
            "experts_implementation": self.experts,
            "tried_ms": self.tried,
            "attention": self.model.config._attn_implementation,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "device": self.device,
            "threads": self.torch.get_num_threads(),
            "completion": self.complete(self.tokens).tolist(),
            "versions": {
                "torch": self.torch.__version__, "transformers": transformers.__version__
            },
        }  # fmt: skip

    def step(self, asked: str) -> float:
        """Milliseconds of one completion of all prompts."""
        if asked != "generate":
            raise ValueError(f"no pass {asked!r}")
        return self._timed(self.tokens)

    def _timed(self, tokens: int) -> float:
        start = time.perf_counter()
        self.complete(tokens)
        return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
