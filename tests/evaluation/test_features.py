"""Features of every block, and how images get to the encoder."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastbeit.evaluation.features import extract_features, load_images, raw_pixels


class MemorySource:
    """Encoded images in a list."""

    def __init__(self, files, labels, classes=None):
        self.files, self.classes = files, classes
        self.labels = None if labels is None else np.array(labels, dtype=np.int64)

    def __len__(self):
        return len(self.files)

    def read(self, index):
        return self.files[index]

    def name(self, index):
        return f"memory/{index}.png"


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


class TwoBlocks(torch.nn.Module):
    """Tokens that say where they come from: CLS holds block + 1, patches the patches' means."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.config = SimpleNamespace(image_hw=(4, 4), in_channels=3)
        self.batches, self.modes = [], []

    def layer_features(self, images):
        self.batches.append(len(images))
        self.modes.append(self.training)
        patches = torch.nn.functional.avg_pool2d(images, 2).flatten(2).mT * self.weight
        cls = torch.ones_like(patches[:, :1])
        return [torch.cat([cls * (k + 1), patches * (k + 1)], dim=1) for k in range(2)]


def test_features_are_both_poolings_of_every_block_in_order():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, size=(5, 3, 4, 4), dtype=np.uint8)
    model = TwoBlocks().train()
    features = extract_features(
        model, pixels, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2), batch_size=2
    )
    assert features.shape == (2, 2, 5, 3) and features.dtype == np.float32
    normalised = (pixels.mean((2, 3)) / 255 - [0.5, 0.4, 0.3]) / [0.5, 0.25, 0.2]
    for block in (0, 1):
        assert np.array_equal(features[block, 0], np.full((5, 3), block + 1))
        np.testing.assert_allclose(features[block, 1], normalised * (block + 1), atol=1e-5)
    assert model.batches == [2, 2, 1]
    assert model.modes == [False] * 3 and model.training  # evaluation mode, then put back


def test_images_of_the_models_size_are_taken_as_they_are():
    rng = np.random.default_rng(1)
    arrays = rng.integers(0, 256, size=(3, 4, 4, 3), dtype=np.uint8)
    images = load_images(MemorySource([_png(a) for a in arrays], [2, 0, 1]), size=(4, 4))
    assert np.array_equal(images.pixels, arrays.transpose(0, 3, 1, 2))
    assert images.labels.tolist() == [2, 0, 1] and images.bad == []


@pytest.mark.parametrize(("height", "width"), [(64, 128), (128, 64), (20, 40)])
def test_larger_and_smaller_images_become_their_centre(height, width):
    # Red on the left and the top eighth, green elsewhere: the centre crop sees the middle only.
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[..., 1] = 255
    array[: height // 32 + 1, :, :] = [255, 0, 0]
    array[:, : width // 32 + 1, :] = [255, 0, 0]
    images = load_images(MemorySource([_png(array)], [0]), size=(16, 16))
    assert images.pixels.shape == (1, 3, 16, 16)
    assert (images.pixels[0, 1] > 240).all() and (images.pixels[0, 0] < 15).all()


def test_grey_models_get_one_channel_and_other_shapes_are_cropped_to_fit():
    array = np.full((30, 50), 90, dtype=np.uint8)
    images = load_images(MemorySource([_png(array)], [0]), size=(8, 12), channels=1)
    assert images.pixels.shape == (1, 1, 8, 12) and (images.pixels == 90).all()


def test_bad_images_are_left_out_and_named():
    good = _png(np.zeros((4, 4, 3), dtype=np.uint8))
    images = load_images(MemorySource([good, b"not an image", good], [5, 6, 7]), size=(4, 4))
    assert images.labels.tolist() == [5, 7]
    assert images.bad == ["memory/1.png"]
    with pytest.raises(ValueError, match="none of the 1 images"):
        load_images(MemorySource([b""], [0]), size=(4, 4))


def test_limit_draws_a_repeatable_random_subset():
    files = [_png(np.full((4, 4, 3), i, dtype=np.uint8)) for i in range(20)]
    source = MemorySource(files, list(range(20)))
    first = load_images(source, size=(4, 4), limit=6, seed=3)
    again = load_images(source, size=(4, 4), limit=6, seed=3)
    other = load_images(source, size=(4, 4), limit=6, seed=4)
    assert len(set(first.labels.tolist())) == 6
    assert first.labels.tolist() == again.labels.tolist() != other.labels.tolist()
    assert (first.pixels[:, 0, 0, 0] == first.labels).all()


def test_sources_without_labels_and_short_means_are_refused():
    with pytest.raises(ValueError, match="needs labels"):
        load_images(MemorySource([b""], None), size=(4, 4))
    with pytest.raises(ValueError, match="each of the 3 channels, got 1 and 3"):
        extract_features(
            TwoBlocks(), np.zeros((1, 3, 4, 4), np.uint8), mean=(0.5,), std=(1.0, 1.0, 1.0)
        )


def test_raw_pixels_count_grey_once_and_are_averaged_when_large():
    grey = np.repeat(np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4), 3, axis=1)
    np.testing.assert_allclose(raw_pixels(grey)[0, 0, 0], np.arange(16) / 255, rtol=1e-6)
    colour = grey.copy()
    colour[0, 2] = 0
    assert raw_pixels(colour).shape == (1, 1, 1, 48)
    large = np.full((2, 1, 64, 64), 51, dtype=np.uint8)
    assert raw_pixels(large).shape == (1, 1, 2, 32 * 32)
    np.testing.assert_allclose(raw_pixels(large), 0.2, rtol=1e-6)
