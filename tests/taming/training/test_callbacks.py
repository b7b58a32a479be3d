import random
import types

import numpy as np
import pytest
import torch
from PIL import Image

from taming.training.callbacks import ImageLogger, LossCurve, RandomState


class Model:
    """As much of a Lightning module as the picture logger looks at."""

    training, current_epoch, global_step, _trainer = True, 0, 1, None

    def __init__(self, folder):
        self.logger = types.SimpleNamespace(save_dir=str(folder))
        self.modes = []

    def eval(self):
        self.training = False

    def train(self):
        self.training = True

    def log_images(self, batch, split, **options):
        self.modes.append(self.training)
        return {
            "samples": torch.full((6, 3, 4, 4), 2.0),
            "row": torch.zeros(3, 8, 20),
            "text": "not a picture",
        }


def test_pictures_are_drawn_at_powers_of_two_and_then_regularly():
    logger = ImageLogger(batch_frequency=16)
    assert [i for i in range(70) if logger.check_frequency(i)] == [1, 2, 4, 8, 16, 32, 48, 64]
    assert not ImageLogger(batch_frequency=4).check_frequency(0)
    assert ImageLogger(batch_frequency=4, log_first_step=True).check_frequency(0)
    with pytest.raises(ValueError, match="disabled=true"):
        ImageLogger(batch_frequency=0)


def test_grids_are_files_with_step_epoch_and_batch_in_their_names(tmp_path):
    model = Model(tmp_path)
    logger = ImageLogger(batch_frequency=4, max_images=2)
    logger.on_train_batch_end(None, model, None, {}, 7)
    files = {p.name: p for p in (tmp_path / "images" / "train").iterdir()}
    assert sorted(files) == ["row_gs-000001_e-000000_b-000007.png", "samples_gs-000001_e-000000_b-000007.png"]
    samples = np.asarray(Image.open(files["samples_gs-000001_e-000000_b-000007.png"]))
    assert samples.shape[:2] == (8, 14) and samples.max() == 255  # two images beside each other, clamped
    row = Image.open(files["row_gs-000001_e-000000_b-000007.png"])
    assert row.size == (20, 8) and row.mode == "RGB"  # max_images=2 must not cost a grid its third channel
    assert model.modes == [False] and model.training  # drawn in eval mode, training goes on


def test_a_disabled_logger_and_step_zero_draw_nothing(tmp_path):
    model = Model(tmp_path)
    ImageLogger(batch_frequency=1, disabled=True).on_train_batch_end(None, model, None, {}, 0)
    model.global_step = 0
    ImageLogger(batch_frequency=1).on_train_batch_end(None, model, None, {}, 0)
    assert not model.modes


def test_restored_random_states_continue_every_stream():
    callback = RandomState()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    saved = callback.state_dict()

    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()

    first = draw()
    draw()
    callback.load_state_dict(saved)
    assert draw() == first


def test_the_saved_random_state_is_plain_data(tmp_path):
    torch.save(RandomState().state_dict(), tmp_path / "state.ckpt")
    torch.load(tmp_path / "state.ckpt", weights_only=True)


@pytest.fixture
def trainer():
    return types.SimpleNamespace(
        global_step=0, progress_bar_metrics={}, callback_metrics={}, sanity_checking=False
    )


def test_the_loss_curve_averages_steps_survives_a_resume_and_is_a_picture(tmp_path, trainer):
    curve = LossCurve(str(tmp_path / "curve.png"), every_n_steps=2)
    for step, loss in enumerate([4.0, 2.0, 1.0, 3.0], start=1):
        trainer.global_step, trainer.progress_bar_metrics = (
            step,
            {"train/loss_step": loss, "train/loss_epoch": 99.0, "lr": 1.0},
        )
        curve.on_train_batch_end(trainer, None, None, None, step)
    assert curve.points == {"train/loss": [[2, 3.0], [4, 2.0]]}
    again = LossCurve(str(tmp_path / "curve.png"), every_n_steps=2)
    again.load_state_dict(curve.state_dict())
    trainer.callback_metrics = {"val/loss_simple": torch.tensor(0.5)}
    again.on_validation_end(trainer, types.SimpleNamespace(monitor="val/loss_simple"))
    assert (
        again.points["val/loss_simple"] == [[4, 0.5]]
        and again.points["train/loss"] == curve.points["train/loss"]
    )
    assert Image.open(tmp_path / "curve.png").size[0] > 500


def test_without_matplotlib_the_loss_curve_says_what_to_install(tmp_path, monkeypatch, caplog, trainer):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    curve = LossCurve(str(tmp_path / "curve.png"))
    curve.points = {"train/loss": [[1, 1.0]]}
    curve.draw()
    assert "needs matplotlib" in caplog.text and not (tmp_path / "curve.png").exists()


def test_samples_that_overflow_cost_a_warning_not_the_training(tmp_path, caplog):
    model = Model(tmp_path)

    def overflow(batch, split, **options):
        raise FloatingPointError("infinite at step 7")

    model.log_images = overflow
    ImageLogger(batch_frequency=4).on_train_batch_end(None, model, None, {}, 7)
    assert "infinite at step 7" in caplog.text and model.training
