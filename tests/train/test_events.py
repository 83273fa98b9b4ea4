"""Event files against TensorBoard's own reader."""

import math
import warnings

import pytest

from herd.train.events import EventFile, crc32c

SINGLE = 2.0**-23
"""Values are stored in single precision."""


def reader(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_crc32c_of_published_vectors():
    # RFC 3720, appendix B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"123456789") == 0xE3069283


def test_tensorboard_reads_scalars_and_texts(tmp_path):
    file = EventFile(tmp_path)
    for step in (1, 2, 300, 70_000):
        file.scalars(step, {"train/loss": 1 / step, "train/grad_norm": -3.5})
    file.scalars(70_001, {"train/loss": math.inf, "train/grad_norm": 1e300})
    file.text(300, "samples/Hi", "**Hi**\n\n    Grüß dich!")
    found = reader(tmp_path)
    losses = found.Scalars("train/loss")
    assert [point.step for point in losses] == [1, 2, 300, 70_000, 70_001]
    assert [point.value for point in losses[:4]] == pytest.approx([1, 0.5, 1 / 300, 1 / 70_000], rel=SINGLE)
    assert losses[4].value == math.inf
    assert found.Scalars("train/grad_norm")[4].value == math.inf  # too large for single precision
    (text,) = found.Tensors("samples/Hi")
    assert text.step == 300
    assert text.tensor_proto.string_val[0].decode() == "**Hi**\n\n    Grüß dich!"
    assert found.PluginTagToContent("text") == {"samples/Hi": b""}


def test_a_run_that_goes_on_replaces_the_steps_it_lost(tmp_path):
    for begin, steps in ((0, range(1, 6)), (3, range(4, 8))):
        file = EventFile(tmp_path, begin)
        for step in steps:
            file.scalars(step, {"train/loss": begin + step})
        points = reader(tmp_path).Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1), (2, 2), (3, 3), (4, 7), (5, 8), (6, 9), (7, 10)]


def test_a_torn_record_ends_the_file_for_readers(tmp_path):
    file = EventFile(tmp_path)
    file.scalars(1, {"a": 1.0})
    file.scalars(2, {"a": 2.0})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert [point.step for point in reader(tmp_path).Scalars("a")] == [1]
