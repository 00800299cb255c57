"""Fashion-MNIST, 28x28 at three levels: configs/mnist.py on other pictures, mirrored half of the time.

Expected: recognisable garments after some thousand steps; no figures were measured. Data: TFDS fashion_mnist (30 MB).

python run_train.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist --download
"""

from configs import mnist


def get_config():
    config = mnist.get_config()
    config.data.source = "tfds:fashion_mnist"
    config.data.random_flip = True
    return config
