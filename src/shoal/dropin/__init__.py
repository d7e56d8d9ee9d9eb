"""Names that people who come from torch and Horovod know, over shoal's own groups and sums.

Data, weights, generators and buffers stay the user's here, as with torch: shoal sends, sums in a fixed order, and says
when ranks do the same work twice or drift apart. The same bits come again at one world size.
"""
