import numpy as np
import pytest
import tensorflow_datasets as tfds

from ddpm_tf.data.sources import load_source
from ddpm_tf.errors import InputError


class PaintedShapes(tfds.core.GeneratorBasedBuilder):
    """A data set of 6 images, prepared on the spot."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(num_classes=6)}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({**features, "id": tfds.features.Text()})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for k in range(6):
            yield k, {"image": np.full((8, 8, 3), k, np.uint8), "label": k, "id": str(k)}


@pytest.mark.parametrize(("file_format", "in_memory_mb"), [("tfrecord", 10), ("array_record", 0)])
def test_tfds_by_name_in_memory_and_by_random_access(tmp_path, file_format, in_memory_mb):
    PaintedShapes(data_dir=tmp_path, file_format=file_format).download_and_prepare()
    name = PaintedShapes.name
    options = {"image_shape": (8, 8, 3), "data_dir": str(tmp_path), "in_memory_mb": in_memory_mb}
    source = load_source(f"tfds:{name}", **options)
    batch = source.read(np.arange(6))
    assert set(batch) == {"image", "label"} and source.num_examples == 6
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    np.testing.assert_array_equal(np.sort(batch["label"]), np.arange(6))
    np.testing.assert_array_equal(source.read(np.array([4]))["label"], batch["label"][4:5])
    with pytest.raises(InputError, match="no split 'test', only"):
        load_source(f"tfds:{name}", split="test", **options)


def test_tfds_without_random_access_says_what_to_do(tmp_path):
    PaintedShapes(data_dir=tmp_path, file_format="tfrecord").download_and_prepare()
    with pytest.raises(InputError, match="--file_format=array_record"):
        load_source(f"tfds:{PaintedShapes.name}", image_shape=(8, 8, 3), data_dir=str(tmp_path), in_memory_mb=0)


def test_a_download_that_fails_is_one_message(tmp_path, monkeypatch):
    def fail(self):
        raise ConnectionError("no network")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(InputError, match="'mnist' cannot be downloaded and prepared: no network"):
        load_source("tfds:mnist", image_shape=(28, 28, 1), data_dir=str(tmp_path), download=True)
    with pytest.raises(InputError, match="There is no TFDS data set 'mnist:99.0.0'"):
        load_source("tfds:mnist:99.0.0", image_shape=(28, 28, 1), data_dir=str(tmp_path))


def test_tfds_that_is_not_prepared_gives_the_command(tmp_path):
    with pytest.raises(InputError, match=f"tfds build mnist --data_dir={tmp_path}"):
        load_source("tfds:mnist", image_shape=(28, 28, 1), data_dir=str(tmp_path))
    with pytest.raises(InputError, match="There is no TFDS data set 'minst'"):
        load_source("tfds:minst", image_shape=(28, 28, 1), data_dir=str(tmp_path))
