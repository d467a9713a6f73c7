"""The planner on CUDA: what `paged.attention` and `paged.maskers` do on CPUs, in launches alone.

- `space`: memory for the layers of an engine, asked for once.
- `attention`: a list of maskers, applied to the queries of a layer.
- `maskers`, `indices`: the counterparts of `paged.maskers` and of the block indices, a file each.
- `cache`: a layer's cache, and how keys, values and indices get into it.
- `step`: one engine step, in tensors that stay where they are.

Sizes that follow from lengths are computed on the host, once per step (`DeviceAttention.sizes`),
and uploaded together; what a layer does, it does on the device, without looking at any value.
"""
