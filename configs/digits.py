"""scikit-learn's 1,797 handwritten digits, 8x8: the bundled data set, minutes on 2 cores.

python run_train.py --config=configs/digits.py --workdir=runs/digits
"""

from ddpm_tf import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.source = "digits"
    config.data.image_size = 8
    config.data.channels = 1
    config.network.ch = 32
    config.network.ch_mult = (1, 2)
    config.network.num_res_blocks = 1
    config.network.attn_resolutions = (4,)
    config.network.num_groups = 8  # 4 channels each, as the paper's; with 32 the blocks of 32 channels would not see t
    config.train.num_steps = 1200
    config.train.log_every = 50
    config.train.checkpoint_every = 300
    config.train.sample_every = 400
    config.train.ema_decay = 0.995  # 0.9999 would keep the initial weights for 1,500 steps
    config.train.jit_compile = "on"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.sample.sampler = "dpm_solver"  # the best at 20 network evaluations, see docs/samplers.md
    config.sample.spacing = "trailing"
    config.sample.num_steps = 20
    return config
