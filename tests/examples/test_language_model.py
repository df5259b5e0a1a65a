"""The language model's example trains, and its perplexities are what they are called."""

from __future__ import annotations

import pytest
import torch

from examples.emoji.characters import CHARACTERS
from examples.language_model import CharacterModel, frequency_perplexity, main


def test_training_lowers_the_perplexity(emoji, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results, texts = main(emoji[::16], epochs=2)
    assert results["trained"] < results["untrained"]
    assert results["untrained"] == pytest.approx(CHARACTERS, rel=0.2)
    assert len(texts) == 5


def test_equal_frequencies_have_the_perplexity_of_their_number():
    every = [torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(CHARACTERS)])]
    assert frequency_perplexity(every, every) == pytest.approx(CHARACTERS)


def test_a_character_sees_those_before_it_alone():
    torch.manual_seed(0)
    model = CharacterModel().eval()
    tokens = torch.randint(1, CHARACTERS, (2, 9))
    changed = tokens.clone()
    changed[:, 5:] = 3
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5])
