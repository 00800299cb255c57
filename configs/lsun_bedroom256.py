"""LSUN bedroom 256x256 as in Ho et al. 2020, table 3 and appendix B: 114 M parameters, batch 64, 2,400,000 steps.

Expected (the paper): FID 6.36 (4.90 with the large network), measured with StyleGAN2's code.
The paper flips all data but bedroom; the release's script flips by default.
Cost: the paper trained on a TPU v3-8; not run here. Data: StyleGAN2's TFRecords of LSUN bedroom at resolution 256.

python run_train.py --config=configs/lsun_bedroom256.py --workdir=runs/lsun_bedroom256 \\
  --config.data.source=tfrecord:bedroom-r08.tfrecords
"""

from configs import celebahq256


def get_config():
    config = celebahq256.get_config()
    config.data.source = "tfrecord:bedroom-r08.tfrecords"
    config.data.random_flip = False
    config.train.num_steps = 2_400_000
    return config
