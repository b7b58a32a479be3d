import math

import pytest
import torch
from PIL import Image

from sgm.data.clips import MOTIONS, ClipDataModule, Motion, MovingPictures, collate_clips, move
from sgm.modules.diffusionmodules.sigma_sampling import ClipSampling

PICTURES = {
    "target": "taming.data.emoji.EmojiImages",
    "params": {"size": 16, "split": "validation", "categories": ["Food & Drink"]},
}


def dot(row, column, size=9):
    picture = torch.ones(3, size, size)
    picture[:, row, column] = -1.0
    return picture


def test_a_quarter_turn_to_the_left_takes_the_right_edge_to_the_top():
    frames = move(dot(4, 8), MOTIONS["turn left"], 3)
    torch.testing.assert_close(frames[0], dot(4, 8))
    torch.testing.assert_close(frames[-1], dot(0, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "motion, place",
    [(Motion(right=1 / 3), (4, 7)), (Motion(up=1 / 3), (1, 4)), (Motion(turn=math.pi, up=1 / 3), (1, 4))],
)
def test_pictures_go_by_shares_of_their_side(motion, place):
    torch.testing.assert_close(move(dot(4, 4), motion, 5)[-1], dot(*place), atol=1e-4, rtol=0)


def test_a_picture_of_half_the_size_covers_a_quarter_of_the_white_it_leaves():
    last = move(-torch.ones(3, 16, 16), MOTIONS["shrink"], 4)[-1]
    assert (last < 0).float().mean() == pytest.approx(0.25)
    assert last[:, 0, 0].tolist() == [1, 1, 1]


def test_clips_are_batches_of_frames_for_a_video_network():
    dataset = MovingPictures(PICTURES, num_frames=4, varied=False)
    batch = collate_clips([dataset[i] for i in range(3)])
    assert batch["jpg"].shape == (12, 3, 16, 16) and batch["num_video_frames"] == 4
    assert batch["motion"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    torch.testing.assert_close(batch["jpg"][::4], batch["cond_frames"])
    module = ClipDataModule(
        batch_size=2, num_workers=0,
        train={"target": "sgm.data.clips.MovingPictures", "params": {"pictures": PICTURES, "motions": ["rise"]}},
    )  # fmt: skip
    module.prepare_data()
    batch = next(iter(module.train_dataloader()))
    assert batch["jpg"].shape == (16, 3, 16, 16) and batch["motion"].sum() == 0


def test_impossible_clips_are_refused():
    with pytest.raises(ValueError, match="'jump' is unknown; choose among turn left"):
        MovingPictures(PICTURES, motions=["jump"])
    with pytest.raises(ValueError, match="two frames at least"):
        MovingPictures(PICTURES, num_frames=1)


def test_all_frames_of_a_clip_have_one_noise_level():
    sampling = ClipSampling({"target": "sgm.modules.diffusionmodules.sigma_sampling.EDMSampling"}, 3)
    sigmas = sampling(6)
    assert sigmas.shape == (6,) and sigmas.unique().numel() == 2 and sigmas[0] == sigmas[2]
    assert sampling(3, torch.zeros(1))[0] == pytest.approx(math.exp(-1.2))
    with pytest.raises(ValueError, match="7 frames are no whole clips of 3"):
        sampling(7)


def test_a_tiny_video_model_trains_and_its_clips_are_written(tmp_path, capsys):
    from omegaconf import OmegaConf

    from main import main
    from scripts import animate

    autoencoder = {"target": "sgm.models.autoencoder.IdentityFirstStage"}
    overrides = OmegaConf.create(
        {
            "model": {"params": {"scale_factor": 1.0, "network_config": {"params": {
                "in_channels": 6, "out_channels": 3, "model_channels": 32, "channel_mult": [1], "attention_resolutions": [1]}}}},
            "lightning": {"trainer": {"max_steps": 2, "accelerator": "cpu"}},
        }
    )  # fmt: skip
    config = OmegaConf.merge(OmegaConf.load("configs/quickstart/image_to_video.yaml"), overrides)
    config.model.params.first_stage_config = autoencoder
    embedder = config.model.params.conditioner_config.params.emb_models[1].params
    embedder.encoder_config, embedder.scale_factor = autoencoder, 1.0
    for split in ("train", "validation"):
        config.data.params[split].params.pictures = PICTURES
    config.data.params.batch_size = 1
    OmegaConf.save(config, tmp_path / "clips.yaml")
    main(["--base", str(tmp_path / "clips.yaml"), "-t", "-l", str(tmp_path / "logs"), "--no-test",
          "lightning.trainer.enable_progress_bar=false"])  # fmt: skip
    run = next((tmp_path / "logs").iterdir())
    argv = ["-r", str(run), "-n", "2", "--columns", "2", "--device", "cpu", "-o", str(tmp_path / "clips.gif"),
            "model.params.sampler_config.params.num_steps=2"]  # fmt: skip
    assert animate.main(argv) == 0 == animate.main(argv)
    with Image.open(tmp_path / "clips.gif") as clip:
        assert clip.n_frames == 6 and clip.size == (2 * 3 * 16, 16)
    assert (tmp_path / "clips-0001.gif").is_file()
    assert "of a clip that stands still" in capsys.readouterr().out
    assert animate.main(["-r", str(run), "-n", "0"]) == 2
