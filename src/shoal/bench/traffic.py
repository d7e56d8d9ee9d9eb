"""What a rank has to send in a step, by ZeRO's formulas."""

from __future__ import annotations

from shoal.strategy import Shard


def formula(shard: Shard, *, copies: int, per_copy: int, turns: int, parameters: int, gradients: int) -> float:
    """Bytes of a rank in a step, on average over ranks (ZeRO, Rajbhandari et al. 2020, section 7).

    An all-reduce is a reduce-scatter and a gather. ZeRO-3 gathers before forward and before backward of each of a
    rank's leaves. Gradients travel after every leaf from ZeRO-2 on, and copies all-reduce what each rank owns.

    Args:
        shard: what is cut.
        copies, per_copy: of the model, and ranks that hold one of them.
        turns: leaves of a rank in a step.
        parameters, gradients: bytes of the whole model's.
    """
    part = (per_copy - 1) / per_copy
    between = 2 * (copies - 1) / copies * gradients / per_copy
    if shard == Shard.NOTHING:
        return between
    gathers = 2 * turns if shard == Shard.PARAMETERS else 1
    sums = 1 if shard == Shard.OPTIMIZER else turns
    return part * (gathers * parameters + sums * gradients) + between
