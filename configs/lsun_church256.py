"""LSUN church 256x256 as in Ho et al. 2020, table 3 and appendix B: 114 M parameters, batch 64, 1,200,000 steps.

Expected (the paper): FID 7.89, measured with StyleGAN2's code.
The released checkpoint is of step 4,432,000.
Cost: the paper trained on a TPU v3-8; not run here. Data: StyleGAN2's TFRecords of LSUN church at resolution 256.

python run_train.py --config=configs/lsun_church256.py --workdir=runs/lsun_church256 \\
  --config.data.source=tfrecord:church-r08.tfrecords
"""

from configs import celebahq256


def get_config():
    config = celebahq256.get_config()
    config.data.source = "tfrecord:church-r08.tfrecords"

    config.train.num_steps = 1_200_000
    return config
