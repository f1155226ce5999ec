"""A sum over workers that is bit-identical for any number of workers.

Floating-point addition is not associative, so the order of a sum decides its last bits. Here the order is a binary tree
over the parts, whichever worker computes a part. Plain torch.distributed.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def tree_sum(part: Callable[[int], Tensor], owners: Sequence[int], rank: int, out: Tensor) -> Tensor:
    """Write part(0) + ... + part(n - 1) to `out` on every worker, and return it. All workers must call it together.

    part: computes the i-th summand, a new tensor like `out`. owners: the rank that computes each part, in ascending
    order, so that most additions need no communication. Memory: one summand for each level of the tree.
    """

    def total(first: int, after: int) -> Tensor | None:
        """Return the sum of parts [first, after) on the owner of the first part; None on other workers."""
        if after - first == 1:
            return part(first) if owners[first] == rank else None
        middle = (first + after) // 2
        left, right = total(first, middle), total(middle, after)
        receiver, sender = owners[first], owners[middle]
        if receiver != sender and rank == sender:
            assert right is not None
            dist.send(right, receiver)
        if rank != receiver:
            return None
        assert left is not None
        if receiver != sender:
            right = torch.empty_like(left)
            dist.recv(right, sender)
        assert right is not None
        return left.add_(right)

    result = total(0, len(owners))
    if result is not None:
        out.copy_(result)
    if owners[0] != owners[-1]:
        dist.broadcast(out, owners[0])
    return out
