"""Ask kvpress what ``longctx bench cache`` asks: the same exported model, contexts, questions and budgets.

kvpress wants an older transformers than longctx, so it runs in an environment of its own:

    python -m venv kvpress-env
    kvpress-env/bin/pip install "torch==2.13.0" kvpress
    kvpress-env/bin/python tools/kvpress_reference.py MODEL --questions asked.json --json kvpress.json

MODEL and asked.json are what ``longctx bench cache MODEL --questions asked.json`` used and wrote.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def presses(window: int) -> dict[str, Any]:
    """Those of kvpress that do what a method of ours does, by its name."""
    import kvpress

    streaming = kvpress.StreamingLLMPress(n_sink=4)
    return {
        "random": kvpress.RandomPress(seed=0),
        "key-norm": kvpress.KnormPress(),
        "key-norm, adaptive": kvpress.AdaKVPress(kvpress.KnormPress()),
        "key-diff": kvpress.KeyDiffPress(),
        "snapkv": kvpress.SnapKVPress(window_size=window, kernel_size=5),
        "snapkv, adaptive": kvpress.AdaKVPress(kvpress.SnapKVPress(window_size=window, kernel_size=5)),
        "tova": kvpress.TOVAPress(),
        "expected-attention": kvpress.ExpectedAttentionPress(n_future_positions=512, n_sink=4),
        "recency": streaming,
    }


def accuracy(model: Any, press: Any, asked: dict[str, Any]) -> float:
    """Share of right answers, one context at a time, as kvpress works."""
    import torch
    from transformers import DynamicCache

    right = 0
    for context, question, answer in zip(asked["contexts"], asked["questions"], asked["answers"], strict=True):
        cache = DynamicCache()
        with torch.no_grad():
            with press(model):
                model.model(torch.tensor([context]), past_key_values=cache)
            places = torch.arange(len(context), len(context) + len(question))[None]
            output = model(torch.tensor([question]), past_key_values=cache, position_ids=places)
        right += int(output.logits[0, -1].argmax()) == answer
    return right / len(asked["answers"])


def main() -> int:
    """See the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="sdpa").eval()
    given = json.loads(args.questions.read_text())
    found = []
    for task, asked in given["tasks"].items():
        for name, press in presses(given["window"]).items():
            for share in given["shares"]:
                press.compression_ratio = 1 - share
                value = accuracy(model, press, asked)
                found.append({"task": task, "method": name, "share": share, "accuracy": value})
                print(task, name, share, value, flush=True)
    args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
