"""The held-out emoji: whole families of near twins, chosen by a hash.

Two emoji are in one family if a model that has seen one of them has practically seen the other: if
their names differ only in gender, age or direction ("man teacher", "woman teacher"; "dog", "dog
face"), or if their drawings are nearly identical in some style (the clock faces; the flags of
Indonesia and Monaco). All emoji of a family are in the same split.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

SEEN, UNSEEN_DRAWING, UNSEEN_EMOJI = "seen", "unseen_drawing", "unseen_emoji"
UNSEEN_EMOJI_SHARE = 0.10
UNSEEN_DRAWING_SHARE = 0.20
# Root mean square difference of two drawings in [0, 1]. The 24 clock faces and the keycaps are
# below it; from 0.1 on, faces with different expressions would count as twins.
NEAR_TWIN_DISTANCE = 0.08
DETAIL = re.compile(
    "adult|boy|child|face|facing|girl|left|man|men|mrs|mx|old|older|people|person|right|santa|"
    "woman|women"
)


def strip_details(name: str) -> str:
    """Return a name without its words for gender, age and direction, or "person"."""
    words = [word for word in re.findall(r"[\w#*]+", name.lower()) if not DETAIL.fullmatch(word)]
    return " ".join(words) or "person"


def find_near_twins(drawings: Tensor) -> Tensor:
    """Return the pairs of emoji whose drawings are nearly identical in some style.

    Args:
        drawings: [E, S, 3, H, W], uint8: each emoji in each style.

    Returns:
        [P, 2] indices, the smaller one first.
    """
    near = torch.zeros(len(drawings), len(drawings), dtype=torch.bool)
    for style in drawings.unbind(dim=1):
        pixels = style.flatten(start_dim=1).float() / 255
        near |= torch.cdist(pixels, pixels) < NEAR_TWIN_DISTANCE * pixels.shape[1] ** 0.5
    return near.triu(diagonal=1).nonzero()


def find_families(names: Sequence[str], drawings: Tensor) -> list[int]:
    """Return the index of the first member of each emoji's family.

    Args:
        names: the E names.
        drawings: [E, S, 3, H, W], uint8.
    """
    first = list(range(len(names)))

    def find(member: int) -> int:
        while first[member] != member:
            member = first[member]
        return member

    by_name: dict[str, int] = {}
    same_name = [(by_name.setdefault(strip_details(name), i), i) for i, name in enumerate(names)]
    for a, b in same_name + [(int(a), int(b)) for a, b in find_near_twins(drawings)]:
        low, high = sorted((find(a), find(b)))
        first[high] = low
    return [find(member) for member in range(len(names))]


def assign_splits(families: Sequence[str]) -> dict[str, str]:
    """Return the split of each family, a function of only the families' names and sizes.

    In the order of their hashes, families go to *unseen emoji* until it has a tenth of the emoji,
    then to *unseen drawing* until that has a fifth; all others are *seen*. The hash makes the split
    independent of the meaning of the emoji.

    Args:
        families: the family of each emoji.
    """
    sizes = Counter(families)
    splits: dict[str, str] = {}
    unseen_emoji = UNSEEN_EMOJI_SHARE * len(families)
    unseen_drawing = unseen_emoji + UNSEEN_DRAWING_SHARE * len(families)
    taken = 0
    for family in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        unseen = UNSEEN_EMOJI if taken < unseen_emoji else UNSEEN_DRAWING
        splits[family] = unseen if taken < unseen_drawing else SEEN
        taken += sizes[family]
    return splits
