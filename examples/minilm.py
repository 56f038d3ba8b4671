"""all-MiniLM-L6-v2 in plain numpy: the forward pass of a real sentence-embedding model.

The architecture is BERT's (Devlin et al. 2018) with the six layers, 384 dimensions and twelve heads of
`sentence-transformers/all-MiniLM-L6-v2`: token, position and type embeddings; self-attention and a GELU feed-forward
block, each followed by a residual sum and a layer norm; mean pooling; unit length. Weights come from the model's own
`model.safetensors`, read the way most programs read them: by the safetensors library, into ordinary memory.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file
from tokenizers import Tokenizer

F32 = npt.NDArray[np.float32]

LAYERS = 6
HEADS = 12
LAYER_NORM_EPS = 1e-12
MAX_TOKENS = 256
"""Tokens a sentence is cut to (sentence_bert_config.json)."""


class MiniLM:
    """The model, loaded from a folder that holds `model.safetensors` and `tokenizer.json`."""

    def __init__(self, folder: Path) -> None:
        self.weights: dict[str, F32] = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.no_padding()

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory the weights take."""
        return sum(weight.nbytes for weight in self.weights.values())

    def embed(self, sentence: str) -> F32:
        """The sentence's embedding: shape (384,), unit length."""
        hidden = self._embed_tokens(np.array(self.tokenizer.encode(sentence).ids))
        for layer in range(LAYERS):
            prefix = f"encoder.layer.{layer}"
            attended = self._linear(f"{prefix}.attention.output.dense", self._attention(prefix, hidden))
            hidden = self._layer_norm(f"{prefix}.attention.output.LayerNorm", hidden + attended)
            inner = gelu(self._linear(f"{prefix}.intermediate.dense", hidden))
            outer = self._linear(f"{prefix}.output.dense", inner)
            hidden = self._layer_norm(f"{prefix}.output.LayerNorm", hidden + outer)
        pooled: F32 = hidden.mean(axis=0)
        unit: F32 = pooled / np.linalg.norm(pooled)
        return unit

    def _embed_tokens(self, ids: npt.NDArray[np.int64]) -> F32:
        summed = (
            self.weights["embeddings.word_embeddings.weight"][ids]
            + self.weights["embeddings.position_embeddings.weight"][: len(ids)]
            + self.weights["embeddings.token_type_embeddings.weight"][0]
        )
        return self._layer_norm("embeddings.LayerNorm", summed)

    def _attention(self, prefix: str, hidden: F32) -> F32:
        """Scaled dot-product self-attention of one layer over `hidden`, shape (tokens, 384), heads side by side."""
        query, key, value = (
            self._linear(f"{prefix}.attention.self.{name}", hidden).reshape(len(hidden), HEADS, -1).swapaxes(0, 1)
            for name in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(1, 2) / np.float32(np.sqrt(query.shape[-1]))
        odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed: F32 = odds / odds.sum(axis=-1, keepdims=True) @ value
        return mixed.swapaxes(0, 1).reshape(hidden.shape)

    def _linear(self, name: str, inputs: F32) -> F32:
        outputs: F32 = inputs @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return outputs

    def _layer_norm(self, name: str, inputs: F32) -> F32:
        centred = inputs - inputs.mean(axis=-1, keepdims=True)
        deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(LAYER_NORM_EPS))
        normed: F32 = centred / deviation * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return normed


def gelu(x: F32) -> F32:
    """The exact GELU, x·Φ(x). numpy has no erf: Abramowitz and Stegun 7.1.26, good to 1.5e-7."""
    z = np.abs(x) * np.float32(np.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    activated: F32 = x * np.float32(0.5) * (1 + erf)
    return activated
