"""CelebA-HQ 256x256 as in Ho et al. 2020, appendix B: 114 M parameters, batch 64, 500,000 steps.

Expected: the paper shows samples and gives no FID. The release's class for this data floors the last step's log-variance at
log(1e-20), variance `fixed_small_floored`; samples do not depend on it. Cost: the paper trained on a TPU v3-8; not run
here. Data: TFDS celeb_a_hq/256, prepared by hand from the original images (see its TFDS page).

python run_train.py --config=configs/celebahq256.py --workdir=runs/celebahq256
"""

from ddpm_tf import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.source = "tfds:celeb_a_hq/256"
    config.data.image_size = 256
    config.data.batch_size = 64
    config.data.random_flip = True
    config.diffusion.variance = "fixed_small"
    config.network.ch_mult = (1, 1, 2, 2, 4, 4)
    config.network.dropout = 0.0
    config.train.num_steps = 500_000
    config.optimizer.learning_rate = 2e-5
    return config
