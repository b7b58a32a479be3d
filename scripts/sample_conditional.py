"""Look at a token transformer at work: re-draw an image from its condition, whole or its lower half, at several sizes.

    streamlit run scripts/sample_conditional.py -- -r logs/<run>              # a page with sliders
    python scripts/sample_conditional.py -r logs/<run> --index 3 --completion # the same without a browser, as a PNG

The page needs the extra `demo` (Streamlit, and imageio for the animation). In a notebook call `sample_image`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.inference import InferenceError, save_png
from scripts.make_samples import add_run_arguments, as_map, load, to_pixels, window_of
from taming.checkpoint import CheckpointError
from taming.data.utils import custom_collate
from taming.models.sliding_window import sample_windows
from taming.training.arguments import split_overrides
from taming.util import ConfigError

SCALES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
FRAMES, FPS = 100, 15  # of an animation


def get_parser() -> argparse.ArgumentParser:
    """The published flags, and those of a run without a browser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument("--outdir", default="outputs/sample_conditional", help="folder for the pictures")
    parser.add_argument("--index", type=int, nargs="*", default=[0], help="pictures of the data set")
    parser.add_argument("--scale_factor", type=float, default=1.0, help="of the picture's sides, 0.5 to 4")
    parser.add_argument("--completion", action="store_true", help="keep the upper half, draw the lower")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest code each time")
    parser.add_argument(
        "--animate",
        action="store_true",
        help="also write the drawing of each, code by code: <index>_sampling.mp4",
    )
    return parser


def scaled(x: Any, factor: float) -> Any:
    """Images or maps (b, c, h, w) at another size; anything else as it is."""
    if factor == 1.0 or not isinstance(x, Tensor) or x.ndim != 4:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bicubic" if x.shape[1] == 3 else "nearest")


@torch.no_grad()
def sample_image(
    model: Any,
    batch: Any,
    *,
    scale_factor: float = 1.0,
    completion: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 100,
    sample: bool = True,
    update_every: int = 0,
    callback: Callable[[Tensor], Any] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Draw a batch's images anew from their conditions.

    Args:
        model: a Net2NetTransformer in eval mode.
        batch: of its data set.
        scale_factor: the images' sides are multiplied by it first; maps of codes must not become smaller than the
            transformer's window.
        completion: keep the codes of the upper half.
        temperature, top_k, sample: see `taming.modules.transformer.sampling.Draw`.
        update_every: call `callback` with the images so far, (b, 3, h, w), every so many codes; 0 for never.
        callback: see `update_every`.
        progress: show a bar.

    Returns:
        `original`, `reconstruction`, `conditioning` (where it is an image) and `sample`, (b, c, h, w) in [-1, 1].

    Raises:
        ValueError: the scaled map of codes is smaller than the window.

    Example: `sample_image(model, next(iter(loader)), completion=True)["sample"]`
    """
    x, c = (scaled(t.to(model.device) if isinstance(t, Tensor) else t, scale_factor) for t in model.get_xc(batch))  # fmt: skip
    quant, codes = model.encode_to_z(x)
    b, e, h, w = quant.shape
    codes = codes.reshape(b, h, w)
    tokens = model.encode_to_c(c)[1]
    stage = model.first_stage_model

    def decode(indices: Tensor) -> Tensor:
        return stage.decode(stage.quantize.get_codebook_entry(indices.flatten(), (b, h, w, e)))

    drawn = 0

    def after_code(i: int, j: int, so_far: Tensor) -> None:
        nonlocal drawn
        drawn += 1
        if callback is not None and update_every and drawn % update_every == 0:
            callback(decode(so_far))

    start = codes if completion else torch.zeros_like(codes)
    result = sample_windows(
        model, start, as_map(tokens, codes), first_row=h // 2 if completion else 0, window=window_of(model),
        temperature=temperature, top_k=top_k, sample=sample, progress=progress, callback=after_code,
    )  # fmt: skip
    log = {"original": x, "reconstruction": stage.decode(quant), "sample": decode(result)}
    if isinstance(c, Tensor) and c.ndim == 4:
        shown = c if c.shape[1] in (1, 3) else model.cond_stage_model.to_rgb(c)
        log["conditioning"] = shown.expand(-1, 3, -1, -1)
    return log


def save_animation(frames: Sequence[Tensor], path: Path) -> Path:
    """Write images (3, h, w) in [-1, 1] as an mp4; returns its path.

    Raises:
        InferenceError: ffmpeg is not installed.
    """
    from sgm.inference.frames import write_video  # with all of sgm, which nothing else here needs

    write_video((torch.stack(list(frames)).float() + 1.0) / 2.0, path, FPS)
    return path


def page(opt: argparse.Namespace, overrides: list[str]) -> None:
    """The Streamlit page."""
    import streamlit as st

    st.title("Conditional samples")
    if "loaded" not in st.session_state:
        st.session_state.loaded = load(opt, overrides)
    run, dataset = st.session_state.loaded
    length = len(dataset)
    side = st.sidebar
    index = int(side.number_input(f"Picture (0 to {length - 1})", 0, length - 1, 0))
    factor = side.selectbox("Scale factor", SCALES, index=1)
    completion = side.checkbox("Keep the upper half")
    temperature = side.number_input("Temperature", 0.05, 5.0, opt.temperature)
    codes = run.model.n_codes
    top_k = side.number_input("Top k", 1, codes, min(opt.top_k, codes))
    greedy = side.checkbox("Take the likeliest code each time")
    animate = side.checkbox("Animate")
    every = int(side.number_input("Show every … codes", 1, 1000, 16))
    batch = custom_collate([dataset[index]])
    before = run.model.get_input(run.model.first_stage_key, batch)[0]
    st.image(to_pixels(before), caption=str(batch.get("file_path_", [index])[0]))
    if not st.button("Sample"):
        return
    place, frames = st.empty(), []

    def show(images: Tensor) -> None:
        frames.append(images[0])
        place.image(to_pixels(images[0]))

    with run.model.ema_scope():
        log = sample_image(
            run.model, batch, scale_factor=factor, completion=completion, temperature=float(temperature), top_k=int(top_k),
            sample=not greedy, update_every=every, callback=show, progress=False,
        )  # fmt: skip
    place.image(to_pixels(log["sample"][0]), caption="sample")
    for name in ("conditioning", "reconstruction"):
        if name in log:
            st.image(to_pixels(log[name][0]), caption=name)
    if animate:
        video = save_animation([*frames, log["sample"][0]], Path(opt.outdir) / "sampling.mp4")
        st.video(str(video))


def keep_first(frames: list[Tensor], images: Tensor) -> None:
    """Add the first of some images (b, 3, h, w) to the frames of an animation."""
    frames.append(images[0])


def files(opt: argparse.Namespace, overrides: list[str]) -> Path:
    """The same without a browser: pictures `<index>_<name>.png`, and the animations; returns their folder."""
    run, dataset = load(opt, overrides)
    if opt.seed is not None:
        torch.manual_seed(opt.seed)
    folder = Path(opt.outdir)
    for index in opt.index:
        if not 0 <= index < len(dataset):  # type: ignore[arg-type]
            raise InferenceError(f"--index {index}: the data set has the pictures 0 to {len(dataset) - 1}")  # type: ignore[arg-type]
        frames: list[Tensor] = []
        with run.model.ema_scope():
            log = sample_image(
                run.model, custom_collate([dataset[index]]), scale_factor=opt.scale_factor, completion=opt.completion,
                temperature=opt.temperature, top_k=opt.top_k, sample=not opt.greedy,
                update_every=1 if opt.animate else 0, callback=partial(keep_first, frames),
            )  # fmt: skip
        for name, images in log.items():
            save_png(to_pixels(images[0]), folder / f"{index:06}_{name}.png")
        if opt.animate:
            few = frames[:: max(1, len(frames) // FRAMES)]
            save_animation([*few, log["sample"][0]], folder / f"{index:06}_sampling.mp4")
    return folder


def in_streamlit() -> bool:
    """Whether `streamlit run` started this."""
    if "streamlit" not in sys.modules:
        return False
    from streamlit import runtime

    return runtime.exists()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    overrides, flags = split_overrides(sys.argv[1:] if argv is None else argv)
    opt = get_parser().parse_args(flags)
    try:
        if in_streamlit():
            page(opt, overrides)
            return 0
        print(f"pictures are in {files(opt, overrides)}")
    except (InferenceError, CheckpointError, ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        if in_streamlit():
            import streamlit as st

            st.error(str(error))
            return 0
        return 2
    return 0


if __name__ == "__main__":
    if (status := main()) or not in_streamlit():
        sys.exit(status)
