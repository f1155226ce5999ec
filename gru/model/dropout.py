"""Dropout masks as a pure function of a key, the layer, the lane and the feature: any device and worker makes the same.

The bits are those of splitmix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195), which starts
from the key and gives each position the output of its own step. L layers, B own lanes, G all lanes, E features.
"""

import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = (
    number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as int64


def dropout_mask(share: float, layers: int, lanes: range, all_lanes: int, features: int, key: Tensor) -> Tensor:
    """Return a tensor [L, B, E] of zeros, with probability `share`, and 1 / (1 - share), on the key's device.

    lanes: the own ones of `all_lanes`. key: an int64 of any value, in a tensor of no dimension.
    """
    assert 0 <= share < 1 and layers and lanes and features
    rows = torch.arange(layers, device=key.device).mul_(all_lanes * features).unsqueeze(1)
    positions = rows + torch.arange(lanes.start * features, lanes.stop * features, device=key.device)
    bits = positions.mul_(GOLDEN).add_(key)
    for shift, factor in ((30, FIRST), (27, SECOND)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    # The last step of splitmix64 changes low bits only, and a comparison of int64 looks at high ones.
    kept = bits >= round(share * 2**64) - 2**63
    return (kept * (1 / (1 - share))).view(layers, len(lanes), features)
