"""The captioning example trains, and names drawings."""

from __future__ import annotations

import torch

from examples.captioning import Captioner, captioned, main
from examples.emoji.names import EDGE, PAD, overlap


def test_it_trains_and_names_what_it_never_saw(emoji, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results, written = main(emoji[::12], epochs=2)
    assert len(results) == 6
    assert all(0 <= share <= 1 for share in results.values())
    assert all(" -> " in line for line in written)


def test_padding_changes_neither_features_nor_logits():
    torch.manual_seed(0)
    model = Captioner(words=9).eval()
    image, tokens = torch.rand(1, 3, 32, 32), torch.tensor([[EDGE, 5, 6, EDGE]])
    padded = torch.cat([tokens, torch.full((1, 3), PAD)], dim=1)
    short = captioned(model, {"image": image, "tokens": tokens, "group": torch.tensor([0])})
    long = captioned(model, {"image": image, "tokens": padded, "group": torch.tensor([0])})
    torch.testing.assert_close(short["text_features"], long["text_features"])
    torch.testing.assert_close(short["logits"], long["logits"][:, :4])


def test_a_name_is_the_likeliest_word_after_word():
    torch.manual_seed(0)
    model = Captioner(words=9).eval()
    image = torch.rand(2, 3, 32, 32)
    name = model.name(image, length=3)
    assert name.shape == (2, 4)
    assert torch.equal(model(image, name[:, :3])[2].argmax(dim=2), name[:, 1:])


def test_the_overlap_of_names_is_that_of_their_words():
    assert overlap(["red heart", "cat"], ["heart of red gold", "dog"]) == 0.25
