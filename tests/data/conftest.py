"""Fixtures of the data tests: a byte-level tokenizer with a BOS token, and a data-set builder with this tokenizer."""

import pytest

from support.built import Builder
from support.tiny_tokenizers import byte_level


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("tokenizer"), bos=True)


@pytest.fixture
def build(tmp_path, tokenizer_path):
    return Builder(tmp_path, tokenizer_path)
