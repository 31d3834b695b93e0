"""How many positions and tokens a model takes, wherever its configuration says so."""

import pytest
import torch
import transformers

from optimum_barber.models.limits import positions, vocabulary
from optimum_barber.text.windows import sequence_length

from .conftest import SIZES, tiny_model

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
CONFIGS = {
    "llama": (lambda: transformers.LlamaConfig(max_position_embeddings=128, **SMALL), 128),
    "gpt2": (lambda: transformers.GPT2Config(n_positions=128, vocab_size=99), 128),
    "mpt": (lambda: transformers.MptConfig(max_seq_len=128, vocab_size=99), 128),
    "bloom": (lambda: transformers.BloomConfig(vocab_size=99), None),
    "wrapped": (lambda: transformers.Gemma3Config(text_config={"max_position_embeddings": 128, **SMALL}), 128),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_positions_are_found_under_every_name_and_in_wrappers(family):
    make, expected = CONFIGS[family]
    assert positions(make()) == expected
    assert vocabulary(make()) == 99


@pytest.mark.parametrize("name", ["max_sequence_length", "seq_length", "n_ctx"])
def test_names_of_other_models_count_where_they_are_positive(name):
    class Config:
        vocab_size = None
        max_position_embeddings = None

    config = Config()
    assert positions(config) is None and vocabulary(config) is None and sequence_length(config, 9999) == 9999
    setattr(config, name, -1)
    assert positions(config) is None
    setattr(config, name, 128)
    assert positions(config) == 128 == sequence_length(config, None)
    with pytest.raises(ValueError, match="sequence length 500 is more than the model's 128 positions"):
        sequence_length(config, 500)


def test_the_embedding_counts_before_its_configuration():
    model = tiny_model()
    assert vocabulary(model) == vocabulary(model.config) == SIZES["vocab_size"]
    model.set_input_embeddings(torch.nn.Embedding(305, 32))
    assert vocabulary(model) == 305
