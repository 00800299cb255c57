"""Your own pictures: every image under a folder, cut in the middle to a square and shrunk to 64x64 (docs/data.md).

Not in the paper. At 64x64, batch 64 and 200,000 steps this is days on one GPU; begin with fewer steps.

python run_train.py --config=configs/image_folder.py --workdir=runs/mine --config.data.source=folder:PATH
"""

from ddpm_tf import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.source = "folder:images"
    config.data.image_size = 64
    config.data.batch_size = 64
    config.data.random_flip = True
    config.network.ch_mult = (1, 2, 2, 2)
    config.network.attn_resolutions = (16,)
    config.train.num_steps = 200_000
    config.optimizer.learning_rate = 1e-4
    return config
