"""Class-conditional CIFAR-10: the network of Ho et al. 2020 with a label embedding, for classifier-free guidance.

Not run here, and in neither paper: Ho & Salimans 2022 train on ImageNet. The cost is that of configs/cifar10.py.

python run_train.py --config=configs/cifar10_cond.py --workdir=runs/cifar10_cond --download
"""

from configs import cifar10


def get_config():
    config = cifar10.get_config()
    config.network.num_classes = 10
    config.train.label_dropout = 0.1
    return config
