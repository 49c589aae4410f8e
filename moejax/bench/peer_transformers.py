"""The peer: OLMoE in Transformers on PyTorch, one step at a time, as told on standard input.

Run as a script in a process of its own, which alone imports PyTorch. Every line in either
direction is one JSON value. First in: the settings. First out: ``{"ready": true, ...}``. Then each
``"forward_backward"`` or ``"train_step"`` that comes in is one step, answered by its milliseconds.
``"stop"``, or the end of the input, ends the process. What goes wrong is ``{"error": ...}``.
"""

import json
import sys
import time
from typing import Any

EXPERTS = "grouped_mm"


def main() -> int:
    """Reads settings and steps from standard input until it ends; returns the exit status."""
    # Libraries may print: what they print must not stand between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        model = Peer(json.loads(sys.stdin.readline()))
        answer(model.describe())
        for line in sys.stdin:
            asked = json.loads(line)
            if asked == "stop":
                break
            answer({"ms": model.step(asked)})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


class Peer:
    """An OLMoE with random weights, its optimizer and a batch of random tokens."""

    def __init__(self, settings: dict[str, Any]):
        """Builds the model and takes one step of each pass to warm up.

        Args:
          settings: ``sizes`` (D, L, H, E, K, F, V, B, S), ``device``, ``dtype``, ``threads`` and
            ``seed``.

        Raises:
          RuntimeError: the experts did not run as ``grouped_mm``.
        """
        import torch
        from transformers import OlmoeConfig, OlmoeForCausalLM

        self.torch, self.device = torch, settings["device"]
        torch.set_num_threads(settings["threads"])
        torch.manual_seed(settings["seed"])
        sizes = settings["sizes"]
        config = OlmoeConfig(
            vocab_size=sizes["V"], hidden_size=sizes["D"], intermediate_size=sizes["F"],
            num_hidden_layers=sizes["L"], num_attention_heads=sizes["H"],
            num_experts=sizes["E"], num_experts_per_tok=sizes["K"],
            max_position_embeddings=sizes["S"], output_router_logits=True, use_cache=False,
            pad_token_id=None, eos_token_id=None, experts_implementation=EXPERTS,
        )  # fmt: skip
        with torch.device(self.device):
            self.model = OlmoeForCausalLM(config).to(getattr(torch, settings["dtype"]))
        self.model.train()
        chosen = self.model.get_experts_implementation()[""]
        if chosen != EXPERTS:
            raise RuntimeError(f"Transformers took the experts as {chosen!r}, not {EXPERTS!r}")
        self.tokens = torch.randint(0, sizes["V"], (sizes["B"], sizes["S"])).to(self.device)
        # The fused optimizer is PyTorch's fastest, on CPUs too.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.top_k, self.experts = sizes["K"], sizes["E"]
        self.max_over_mean = self._check_experts()

    def describe(self) -> dict[str, Any]:
        """What was built: parameters, versions, threads, the load of the fullest expert."""
        import transformers

        params = dict(self.model.named_parameters())
        norms = sum(p.numel() for n, p in params.items() if "q_norm" in n or "k_norm" in n)
        return {
            "ready": True,
            "params": sum(p.numel() for p in params.values()),
            "query_key_norms": norms,
            "experts_implementation": EXPERTS,
            "attention": self.model.config._attn_implementation,
            "dtype": str(next(iter(params.values())).dtype).removeprefix("torch."),
            "device": self.device,
            "threads": self.torch.get_num_threads(),
            "max_over_mean": self.max_over_mean,
            "versions": {
                "torch": self.torch.__version__, "transformers": transformers.__version__
            },
        }  # fmt: skip

    def step(self, passes: str) -> float:
        """Milliseconds of one step: ``forward_backward``, or ``train_step`` with clipping and
        AdamW."""
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        if passes == "train_step":
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        elif passes != "forward_backward":
            raise ValueError(f"no pass {passes!r}")
        self._wait()
        return 1e3 * (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def _check_experts(self) -> float:
        """One step of which every operation is looked at: the experts must be grouped products.

        Transformers falls back to a loop without a word where PyTorch's grouped product does not
        take a device or type.

        Returns:
          Load of the fullest expert over the mean, the mean over the layers.
        """
        from torch.utils._python_dispatch import TorchDispatchMode

        seen = set()

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.add(function.name())
                return function(*args, **(kwargs or {}))

        with Watch():
            output = self.model(input_ids=self.tokens, labels=self.tokens)
            output.loss.backward()
        grouped = [name for name in seen if "grouped_mm" in name]
        if not any(name.startswith("aten::") for name in grouped) or any(
            "fallback" in name for name in grouped
        ):
            found = ", ".join(grouped) or "no grouped product"
            raise RuntimeError(f"the experts did not run as {EXPERTS}: {found}")
        ratios = []
        for logits in output.router_logits:
            chosen = logits.float().topk(self.top_k, dim=-1).indices.reshape(-1)
            counts = self.torch.bincount(chosen, minlength=self.experts).float()
            ratios.append(float(counts.max() / counts.mean()))
        return sum(ratios) / len(ratios)


if __name__ == "__main__":
    sys.exit(main())
