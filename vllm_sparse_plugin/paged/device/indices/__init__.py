"""How indices of blocks are brought up to date on the device, a file each."""

from vllm_sparse_plugin.paged.device.indices import (  # noqa: F401  # each registers itself
    bucket_signatures,
    centroid_codes,
    channel_labels,
    hash_signatures,
    page_bounds,
)
