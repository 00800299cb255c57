"""Class-conditional digits with classifier-free guidance (Ho & Salimans 2022): minutes on 2 cores.

python run_train.py --config=configs/digits_cond.py --workdir=runs/digits_cond
python run_sample.py --workdir=runs/digits_cond --labels=3,7 --guidance=1.5
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.network.num_classes = 10
    config.train.label_dropout = 0.1
    # One example in ten trains the null class. So more steps, and an average over more of them, see docs/classes.md.
    config.train.num_steps = 3600
    config.train.ema_decay = 0.998
    config.train.checkpoint_every = 600
    config.train.sample_every = 1200
    return config
