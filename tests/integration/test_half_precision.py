"""Half precision, as a GPU would compute it."""

import numpy as np
import pytest

from tlbatch.errors import ConfigError
from tlbatch.images.decode import decode
from tlbatch.model import engines, tensorflow_engine
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_engine
from tlbatch.schema import NEW_RULES


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The GPU's way, XLA and half precision, walked on a CPU."""
    monkeypatch.setattr(tensorflow_engine, "gpus_of_this_process", lambda: 1)


@pytest.mark.sampled(1)
def test_half_precision_gives_the_same_labels(bundle_url, keras_model, store, as_on_a_gpu):
    pixels = np.stack([decode(path.read_bytes(), (96, 96), rules=NEW_RULES).array for path in sorted(store.rglob("*.jpg"))])
    given = load_engine(load_bundle(bundle_url), "tensorflow", gpu=True, threads=2, batch_size=20).predict(pixels)
    expected = np.asarray(keras_model(pixels)["scores"])
    apart = np.abs(given.scores - expected).max()
    assert 1e-5 < apart < engines.HALF_TOLERANCE, "exactly Keras's scores would not be half precision's"
    assert given.scores.dtype == given.features.dtype == np.float32
    assert (given.scores.argmax(1) == expected.argmax(1)).all()


@pytest.mark.sampled(1)
def test_half_precision_that_the_probes_refuse_is_not_used(bundle_url, keras_model, pixels, as_on_a_gpu, monkeypatch, caplog):
    monkeypatch.setattr(engines, "HALF_TOLERANCE", 1e-9)
    given = load_engine(load_bundle(bundle_url), "tensorflow", gpu=True, threads=2, batch_size=32).predict(pixels)
    assert given.scores == pytest.approx(np.asarray(keras_model(pixels)["scores"]), abs=1e-5)
    assert "using float32" in caplog.text


def test_a_gpu_that_tensorflow_does_not_see_is_said(bundle_url):
    with pytest.raises(ConfigError, match=r"TensorFlow does not see it; install tlbatch\[gpu\]"):
        load_engine(load_bundle(bundle_url), "tensorflow", gpu=True)
