"""How well a token transformer predicts images it has not seen: bits a token, beside what plain frequencies give.

    python scripts/evaluate_tokens.py -r logs/<run>

The baseline guesses each code with its frequency in the training images (one added to every count). Uses the averaged
weights where the run kept an average, and the train and validation sections of the run's configuration.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.inference import InferenceError, choose_device, load_run
from scripts.sample_fast import require_tokens
from taming.checkpoint import CheckpointError
from taming.data.utils import custom_collate
from taming.modules.vqvae.codebook import code_counts, perplexity_of
from taming.training.arguments import split_overrides
from taming.util import ConfigError, instantiate_from_config


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-r", "--resume", required=True, help="folder of a run, or a checkpoint in it")
    parser.add_argument("-b", "--base", nargs="*", default=[], metavar="config.yaml", help="further configurations")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=32, help="pictures at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def unigram_bits(train: Tensor, held_out: Tensor, n_codes: int) -> float:
    """Bits a code of `held_out` costs under the frequencies of `train`, one added to every count."""
    counts = code_counts(train, n_codes).double() + 1
    return float(-(counts / counts.sum()).log2()[held_out.reshape(-1)].mean())


@torch.no_grad()
def codes_of(model: Any, dataset: Any, batch_size: int, name: str) -> Tensor:
    """The codes of each image of a data set once, (images, codes)."""
    once = getattr(dataset, "repeats", 1)
    loader: Any = DataLoader(dataset, batch_size, collate_fn=custom_collate)
    batches = math.ceil(len(dataset) / once / batch_size)
    rows = []
    for _, batch in zip(range(batches), tqdm(loader, total=batches, desc=f"codes of {name}"), strict=False):
        x = model.get_input(model.first_stage_key, batch).to(model.device)
        rows.append(model.encode_to_z(x)[1].cpu())
    return torch.cat(rows)


@torch.no_grad()
def model_bits(model: Any, dataset: Any, batch_size: int) -> float:
    """Bits a code of the data set's images costs under the model."""
    nats = count = 0.0
    for batch in tqdm(DataLoader(dataset, batch_size, collate_fn=custom_collate), desc="held-out images"):
        x, c = (t.to(model.device) if isinstance(t, Tensor) else t for t in model.get_xc(batch))
        logits, target = model(x, c)
        nats += float(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"))
        count += target.numel()
    return nats / count / math.log(2)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    overrides, flags = split_overrides(sys.argv[1:] if argv is None else argv)
    opt = get_parser().parse_args(flags)
    try:
        run = load_run(opt.resume, opt.base, overrides, choose_device(opt.device))
        require_tokens(run.model, opt.resume)
        data = instantiate_from_config(run.config.data)
        data.prepare_data()
        data.setup()
        if missing := {"train", "validation"} - set(data.datasets):
            raise InferenceError(
                f"the configuration's data has no {' and no '.join(sorted(missing))} section"
            )
        held_out = data.datasets["validation"]
        n_codes = run.model.n_codes
        train = codes_of(run.model, data.datasets["train"], opt.batch_size, "train")
        unseen = codes_of(run.model, held_out, opt.batch_size, "validation")
        with run.model.ema_scope():
            bits = model_bits(run.model, held_out, opt.batch_size)
    except (InferenceError, CheckpointError, ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = code_counts(unseen, n_codes)
    print(
        f"step {run.global_step}: {len(unseen)} held-out images of {unseen.shape[1]} codes out of {n_codes}"
    )
    print(f"  this model         {bits:6.2f} bits a token")
    print(f"  unigram            {unigram_bits(train, unseen, n_codes):6.2f} bits a token")
    print(f"  all alike          {math.log2(n_codes):6.2f} bits a token")
    print(f"  codes in use       {float((code_counts(train, n_codes) > 0).float().mean()):6.1%} in training, "
          f"{float((counts > 0).float().mean()):.1%} here (perplexity {float(perplexity_of(counts)):.0f})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
