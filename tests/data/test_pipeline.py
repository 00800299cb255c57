import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.data.pipeline import batch_indices, make_dataset
from ddpm_tf.data.sources import ArraySource
from ddpm_tf.errors import InputError


def source(n):
    images = np.zeros((n, 2, 2, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    return ArraySource(images, labels=np.arange(n))


def labels(steps, n=10, **kwargs):
    dataset = make_dataset(source(n), batch_size=4, seed=1, **kwargs).take(steps)
    return np.concatenate([b["label"].numpy() for b in dataset])


def test_every_epoch_is_a_permutation_of_its_own():
    seen = labels(10).reshape(4, 10)  # 4 epochs of 10, batches of 4 straddle them
    for epoch in seen:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))
    assert len({e.tobytes() for e in seen}) == 4


def test_a_later_start_is_the_same_sequence():
    np.testing.assert_array_equal(labels(10)[4 * 7 :], labels(3, start_step=7))


def test_the_seed_changes_the_order():
    orders = [
        [batch_indices(tf.constant(s), num_examples=10, batch_size=4, seed=seed) for s in (0, 1)] for seed in (1, 2)
    ]
    assert not np.array_equal(*orders)


def test_images_are_scaled_and_belong_to_their_labels():
    batch = next(iter(make_dataset(source(200), batch_size=50, seed=0)))
    assert batch["image"].dtype == tf.float32 and batch["image"].shape == (50, 2, 2, 1)
    np.testing.assert_allclose(batch["image"][:, 0, 0, 0], batch["label"].numpy() / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(batch["image"][:, 1, 1, 0], -1)


def test_flips_are_half_of_all_and_repeat():
    def flipped(start):
        dataset = make_dataset(source(200), batch_size=100, seed=0, random_flip=True, start_step=start)
        return [np.asarray(b["image"][:, 0, 0, 0] == -1) & (b["label"].numpy() > 0) for b in dataset.take(10 - start)]

    whole, later = flipped(0), flipped(4)
    assert abs(np.mean(whole) - 0.5) < 5 * 0.5 / 1000**0.5
    np.testing.assert_array_equal(whole[4:], later)
    assert not np.array_equal(whole[0], whole[2])


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(InputError, match="batch_size=11 is larger than the data set, which has 10"):
        make_dataset(source(10), batch_size=11, seed=0)
