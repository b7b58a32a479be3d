"""Tokens a second: our cached sampler beside our uncached one, and beside transformers' GPT-2 with its static cache.

    python scripts/benchmark/token_sampling.py                        # a small model on the CPU
    python scripts/benchmark/token_sampling.py --model gpt2 --device cuda --dtype bf16 --compile

The three have the same weights and take turns in one run, so that a busy machine slows all alike. Prints tokens a second
(median), the two ratios, and that the greedy tokens agree.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from scripts.benchmark.common import DTYPES, machine, measure, parser, start
from taming.modules.transformer.cache import NextToken
from taming.modules.transformer.mingpt import GPT, generate

# blocks, heads, channels, vocabulary
MODELS: dict[str, tuple[int, int, int, int]] = {
    "tiny": (6, 8, 256, 1024),
    "small": (12, 8, 512, 1024),
    "gpt2": (12, 12, 768, 16384),
    "faces": (24, 16, 1024, 1024),
    "imagenet": (48, 24, 1536, 16384),
}


def build(name: str, block_size: int) -> tuple[GPT, Any]:
    """Ours and transformers', with the same random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    n_layer, n_head, n_embd, vocab_size = MODELS[name]
    ours = GPT(vocab_size, block_size, n_layer, n_head, n_embd)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, activation_function="gelu",
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    peer = GPT2LMHeadModel(config)
    peer.load_state_dict(as_gpt2(ours))
    return ours.eval().requires_grad_(False), peer.eval().requires_grad_(False)


def as_gpt2(model: GPT) -> dict[str, Tensor]:
    """A GPT's weights under the names of transformers' GPT-2, whose linear layers are transposed."""
    w = model.state_dict()
    out = {
        "transformer.wte.weight": w["tok_emb.weight"], "transformer.wpe.weight": w["pos_emb"][0], "lm_head.weight": w["head.weight"],
        "transformer.ln_f.weight": w["ln_f.weight"], "transformer.ln_f.bias": w["ln_f.bias"],
    }  # fmt: skip
    names = {
        "ln1": "ln_1",
        "ln2": "ln_2",
        "attn.proj": "attn.c_proj",
        "mlp.0": "mlp.c_fc",
        "mlp.2": "mlp.c_proj",
    }
    for i in range(len(model.blocks)):
        here, there = f"blocks.{i}.", f"transformer.h.{i}."
        for kind in ("weight", "bias"):
            qkv = torch.cat([w[f"{here}attn.{part}.{kind}"] for part in ("query", "key", "value")])
            out[f"{there}attn.c_attn.{kind}"] = qkv.t()
            for a, b in names.items():
                out[f"{there}{b}.{kind}"] = (
                    w[f"{here}{a}.{kind}"] if "ln" in a else w[f"{here}{a}.{kind}"].t()
                )
    return {k: v.contiguous() for k, v in out.items()}


class Uncached(nn.Module):
    """The same model without its cache: each step reads the whole sequence."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model, self.block_size = model, model.block_size

    def forward(self, idx: Tensor) -> tuple[Tensor, None]:
        """Tokens (b, n) → logits (b, n, vocab), None."""
        return self.model(idx)[0], None


def samplers(
    opt: argparse.Namespace, ours: GPT, peer: Any, prompt: Tensor
) -> dict[str, Callable[..., Tensor]]:
    """Name → a function of `sample` that draws the tokens by chance or greedily."""
    uncached = Uncached(ours)
    assert NextToken(uncached, 1, 1).cache is None

    def transformers(sample: bool) -> Tensor:
        options = {"do_sample": sample, **({"top_k": opt.top_k, "top_p": 1.0} if sample else {})}
        out = peer.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=opt.tokens, min_new_tokens=opt.tokens,
            cache_implementation="static", **options,
        )  # fmt: skip
        return out[:, prompt.shape[1] :]

    def cached(sample: bool) -> Tensor:
        return generate(ours, prompt, opt.tokens, top_k=opt.top_k, sample=sample, compiled=opt.compile)

    def whole(sample: bool) -> Tensor:
        return generate(uncached, prompt, opt.tokens, top_k=opt.top_k, sample=sample)

    return {"cached": cached, "uncached": whole, "transformers": transformers}


def main() -> None:
    options = parser(__doc__, MODELS, "tiny", rounds=3)
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--compile", action="store_true", help="compile our one-token step (CUDA graphs)")
    options.add_argument("--top_k", type=int, default=100)
    options.add_argument("--skip_uncached", action="store_true", help="it is slow for large models")
    opt = start(options)
    ours, peer = (net.to(opt.device, DTYPES[opt.dtype]) for net in build(opt.model, opt.tokens))
    print(
        f"{opt.model}: {sum(p.numel() for p in ours.parameters()) / 1e6:.1f} M parameters, {opt.tokens} tokens, "
        f"{machine(opt)}{', compiled' if opt.compile else ''}"
    )
    for batch in opt.batch:
        prompt = torch.arange(batch, device=opt.device)[:, None]
        calls = samplers(opt, ours, peer, prompt)
        if opt.skip_uncached:
            del calls["uncached"]
        greedy = {name: call(False) for name, call in calls.items()}
        equal = {n: float((t == greedy["cached"]).float().mean()) for n, t in greedy.items() if n != "cached"}
        seconds = measure({n: lambda c=c: c(True) for n, c in calls.items()}, opt.rounds, opt.device)
        speeds = ", ".join(f"{n} {batch * opt.tokens / s:.0f} tokens/s" for n, s in seconds.items())
        ratios = ", ".join(f"{s / seconds['cached']:.2f}x {n}" for n, s in seconds.items() if n != "cached")
        agree = ", ".join(f"{share:.1%} with {n}" for n, share in equal.items())
        print(f"  batch {batch}: {speeds}; cached is {ratios}; greedy tokens agree to {agree}")


if __name__ == "__main__":
    main()
