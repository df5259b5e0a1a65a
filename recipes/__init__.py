"""Whole jobs on a user's own data: train two towers, and use, evaluate and export them.

From a folder to features:

    train(Settings(images="photos", captions="captions.csv"), "runs/photos")
    encoder = Encoder.load("runs/photos")
    features = encoder.encode_texts(["a red bicycle"])
"""

from diptych._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
