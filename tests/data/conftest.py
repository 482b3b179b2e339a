import pytest
from transformers import PreTrainedTokenizerFast

from tests.tiny import make_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()
