"""MNIST, 28x28 at three levels (28, 14, 7). Not in the paper; its settings at a quarter of the width.

Expected: legible digits after some thousand steps; no figures were measured. Data: TFDS mnist (11 MB download).

python run_train.py --config=configs/mnist.py --workdir=runs/mnist --download
"""

from ddpm_tf import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.source = "tfds:mnist"
    config.data.image_size = 28
    config.data.channels = 1
    config.network.ch = 64
    config.network.ch_mult = (1, 2, 2)
    config.network.attn_resolutions = (14,)
    config.network.dropout = 0.1
    config.train.num_steps = 50_000
    config.train.ema_decay = 0.999
    config.optimizer.warmup_steps = 1000
    return config
