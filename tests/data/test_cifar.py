import os
import pickle
import tarfile

import numpy as np
import pytest

from ddpm_tf.data.cifar import _KINDS
from ddpm_tf.data.sources import load_source
from ddpm_tf.errors import InputError

SHAPE = (32, 32, 3)
NAMES = {10: [f"kind{k}" for k in range(10)], 100: [f"kind{k}" for k in range(100)]}


def records(classes, count, seed):
    """uint8 [N, 3, 32, 32] and labels."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.integers(0, 256, (count, 3, 32, 32), np.uint8), rng.integers(0, classes, count)


def write_cifar(folder, classes, counts, *, version="binary"):
    """The authors' files with `counts[split]` images each; returns {split: (images NHWC, labels)}."""
    kind, expected = _KINDS[classes], {}
    for split, count in counts.items():
        parts = []
        for k, name in enumerate(getattr(kind, version)[split]):
            images, labels = records(classes, count, seed=k)
            flat = images.reshape(count, -1)
            if version == "binary":
                first = np.zeros((count, kind.label_bytes), np.uint8)
                first[:, -1] = labels
                (folder / name).write_bytes(np.concatenate([first, flat], axis=1).tobytes())
            else:
                batch = {b"data": flat, kind.key.encode(): labels.tolist(), b"batch_label": b"x"}
                (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
            parts.append((images.transpose(0, 2, 3, 1), labels))
        expected[split] = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    plain, pickled = kind.names
    if version == "binary":
        (folder / plain).write_text("\n".join(NAMES[classes]) + "\n\n")
    else:
        content = {kind.names_key.encode(): [name.encode() for name in NAMES[classes]]}
        (folder / pickled).write_bytes(pickle.dumps(content, protocol=2))
    return expected


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("packed", [False, True])
def test_both_versions_are_read_as_folder_and_tar(tmp_path, classes, version, packed):
    folder = tmp_path / "cifar"
    folder.mkdir()
    expected = write_cifar(folder, classes, {"train": 3, "test": 2}, version=version)
    path = folder
    if packed:
        path = tmp_path / "cifar.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            tar.add(folder, "cifar-batches")
    for split, (images, labels) in expected.items():
        source = load_source(f"cifar{classes}:{path}", image_shape=SHAPE, split=split)
        np.testing.assert_array_equal(source.tensors["image"], images)
        np.testing.assert_array_equal(source.tensors["label"], labels)
        assert source.details.class_names == NAMES[classes]


class Attack:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def test_a_pickle_runs_nothing(tmp_path):
    write_cifar(tmp_path, 10, {"train": 1}, version="python")
    canary = tmp_path / "canary"
    for protocol in range(6):
        (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": Attack(str(canary))}, protocol=protocol))
        with pytest.raises(InputError, match="data_batch_2 is damaged: it asks for .*mkdir"):
            load_source(f"cifar10:{tmp_path}", image_shape=SHAPE)
    assert not canary.exists()


def test_files_that_cannot_be_used_are_named(tmp_path):
    write_cifar(tmp_path, 10, {"train": 2})
    path = tmp_path / "data_batch_3.bin"
    content = path.read_bytes()
    for data, message in (
        (content[:-1], "data_batch_3.bin is damaged: 6,145 bytes are no multiple of 3,073"),
        (b"", "data_batch_3.bin is damaged"),
        (b"\x63" + content[1:], "has the label 99; expected 0..9"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            load_source(f"cifar10:{tmp_path}", image_shape=SHAPE)
    path.unlink()
    with pytest.raises(InputError, match="lacks data_batch_3.bin"):
        load_source(f"cifar10:{tmp_path}", image_shape=SHAPE)
    with pytest.raises(InputError, match="holds no CIFAR-100"):
        load_source(f"cifar100:{tmp_path}", image_shape=SHAPE)
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8bjunk")
    with pytest.raises(InputError, match="cannot be read as a tar file"):
        load_source(f"cifar10:{tmp_path}/x.tar.gz", image_shape=SHAPE)
