"""LSUN cat 256x256 as in Ho et al. 2020, table 3 and appendix B: 114 M parameters, batch 64, 1,800,000 steps.

Expected (the paper): FID 19.75, measured with StyleGAN2's code.
The release's command for cat turns flips off (--randflip 0); the paper says on.
Cost: the paper trained on a TPU v3-8; not run here. Data: StyleGAN2's TFRecords of LSUN cat at resolution 256.

python run_train.py --config=configs/lsun_cat256.py --workdir=runs/lsun_cat256 \\
  --config.data.source=tfrecord:cat-r08.tfrecords
"""

from configs import celebahq256


def get_config():
    config = celebahq256.get_config()
    config.data.source = "tfrecord:cat-r08.tfrecords"

    config.train.num_steps = 1_800_000
    return config
