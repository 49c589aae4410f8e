"""A peer that speaks the protocol and computes nothing; the first line's ``mode`` says how it
fails, if it does."""

import json
import os
import sys
import time

settings = json.loads(sys.stdin.readline())
mode, sizes = settings.get("mode"), settings["sizes"]
if mode == "dies":
    sys.exit("the card is on fire")
if mode == "hangs":
    time.sleep(60)
if mode == "no torch":
    print(json.dumps({"error": "ModuleNotFoundError: No module named 'torch'"}), flush=True)
    sys.exit(1)
d, v = sizes["D"], sizes["V"]
layer = 4 * d * d + 2 * d + d * sizes["E"] + 3 * sizes["E"] * d * sizes["F"]
norms = 2 * d * sizes["L"]
ready = {
    "ready": True, "params": 2 * v * d + d + sizes["L"] * layer + norms, "query_key_norms": norms,
    "experts_implementation": "grouped_mm", "attention": "none", "dtype": settings["dtype"],
    "device": "cpu", "threads": 1, "max_over_mean": 1.5,
    "versions": {"torch": "0", "transformers": "0"}, "wait": os.environ.get("OMP_WAIT_POLICY"),
}  # fmt: skip
if mode == "bigger":
    ready["params"] += 7
print(json.dumps(ready), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked == "stop":
        break
    if mode == "breaks":
        print(json.dumps({"error": "RuntimeError: out of memory"}), flush=True)
    else:
        print(json.dumps({"ms": {"forward_backward": 20.0, "train_step": 30.0}[asked]}), flush=True)
