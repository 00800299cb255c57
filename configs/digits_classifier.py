"""A classifier of noisy digits, which guides the images of configs/digits.py (Dhariwal & Nichol 2021): minutes on 2 cores.

python run_train.py --config=configs/digits_classifier.py --workdir=runs/digits_classifier
python run_sample.py --workdir=runs/digits --classifier=runs/digits_classifier --classifier_scale=1
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.network.name = "classifier"
    config.network.num_classes = 10
    config.train.loss = "cross_entropy"
    config.train.sample_every = 0  # a classifier draws nothing
    return config
