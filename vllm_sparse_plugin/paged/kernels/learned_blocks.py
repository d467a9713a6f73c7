"""Headers of blocks whose codes are made with something learned, and which blocks lack codes.

The header of a block and KV head, int64: how many of its tokens have codes, the *tag* of the
learned state that these codes are of, and *stamps*: numbers that name the first keys of the block,
one for each of some `sizes`, the largest of which is the block's. The stamps are those of KV head
0; the others' are not used. `learned_index` says what all of this is for.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.index_places import first_byte

COUNT, TAG, STAMPS = 0, 1, 2
"""Places in a header."""


@compiled()
def header_of(
    records: np.ndarray, place: tuple[int, int], words: int, block: int, head: int
) -> np.ndarray:
    """The header of a block and KV head, int64, as a view.

    Args:
        records: See the package; so the next one.
        place: Of the index.
        words: Of the header.
        block: Of the cache.
        head: KV head.
    """
    start = first_byte(records, place, block, head)
    header: np.ndarray = records.reshape(-1)[start : start + 8 * words].view(np.int64)
    return header


@compiled()
def coded_tokens(header: np.ndarray, tag: int) -> int:
    """How many leading tokens have codes of the state with this tag."""
    count: int = header[COUNT] if header[TAG] == tag else 0
    return count


@compiled()
def note_codes(header: np.ndarray, tag: int, count: int) -> None:
    """Says that at least the first `count` tokens have codes of the state with this tag now."""
    header[COUNT] = max(coded_tokens(header, tag), count)
    header[TAG] = tag


@compiled()
def chunks_of(queries: np.ndarray, lengths: np.ndarray, block_size: int) -> int:
    """Blocks of the longest of some queries.

    Args:
        queries: `[n]`, int64: which of them.
        lengths: Of all queries.
        block_size: Tokens of a block.
    """
    longest = 0
    for place in range(queries.shape[0]):
        longest = max(longest, lengths[queries[place]])
    return (longest + block_size - 1) // block_size


@compiled()
def note_writes(
    records: np.ndarray,
    place: tuple[int, int],
    block_size: int,
    sizes: np.ndarray,
    first_stamp: int,
    slots: np.ndarray,
) -> None:
    """Takes the codes of written places back, and gives what they are among another stamp.

    Args:
        records: See `header_of`.
        place: See `header_of`.
        block_size: Tokens of a block.
        sizes: int64, ascending: of what stamps name.
        first_stamp: Of as many new numbers as there are slots.
        slots: Where keys were written; negative = padding.
    """
    words = STAMPS + sizes.shape[0]
    for i in range(slots.shape[0]):
        if slots[i] < 0:
            continue
        block, token = slots[i] // block_size, slots[i] % block_size
        for head in range(records.shape[1]):
            header = header_of(records, place, words, block, head)
            # Before its first key is written, a block holds anything.
            header[COUNT] = 0 if token == 0 else min(header[COUNT], token)
        header = header_of(records, place, words, block, 0)
        for k in range(sizes.shape[0]):
            if token < sizes[k]:
                header[STAMPS + k] = first_stamp + i


@compiled(parallel=True)
def name_prefixes(
    records: np.ndarray,
    place: tuple[int, int],
    block_size: int,
    sizes: np.ndarray,
    block_table: np.ndarray,
    rows: np.ndarray,
    prefixes: np.ndarray,
    names: np.ndarray,
) -> None:
    """The stamps that together name the first keys of some sequences.

    Args:
        records: See `note_writes`; so the next three.
        place: Of the index.
        block_size: Tokens of a block.
        sizes: Of what stamps name.
        block_table: See the package.
        rows: `[n]`, of the block table.
        prefixes: `[n]`, int64: how many keys.
        names: `[n, >= blocks of the longest]`, int64; written, one per block.
    """
    words = STAMPS + sizes.shape[0]
    for item in prange(rows.shape[0]):
        blocks = block_table[rows[item]]
        whole, rest = prefixes[item] // block_size, prefixes[item] % block_size
        for i in range(whole):
            header = header_of(records, place, words, np.int64(blocks[i]), 0)
            names[item, i] = header[words - 1]
        if rest > 0:
            k = 0
            while sizes[k] < rest:
                k += 1
            header = header_of(records, place, words, np.int64(blocks[whole]), 0)
            names[item, whole] = header[STAMPS + k]


@compiled()
def list_short_blocks(
    records: np.ndarray,
    place: tuple[int, int],
    words: int,
    block_size: int,
    block_table: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    tags: np.ndarray,
    span: tuple[int, int],
    owners: np.ndarray,
    blocks: np.ndarray,
    wanted: np.ndarray,
    groups: np.ndarray,
) -> tuple[int, int]:
    """Which blocks lack codes, of as many sequences as want the same codes where they share blocks.

    Args:
        records: See `header_of`; so the next two.
        place: Of the index.
        words: Of the header.
        block_size: Tokens of a block.
        block_table: See the package.
        rows: `[groups]`, of the block table.
        lengths: `[groups]`, int64: keys that need codes.
        tags: `[groups]`, int64: of which state.
        span: The first group, and the one after the last that may be taken.
        owners: `[num_blocks]`, int32; overwritten.
        blocks: `[>= blocks of all groups]`, int64: blocks that lack codes; written.
        wanted: int64, as long: how many of their tokens need codes; written.
        groups: int64, as long: a group that wants them; written.

    Returns:
        The group after the last one taken, at least one, and how many blocks are listed.
    """
    owners[:] = 0
    listed = 0
    group = span[0]
    while group < span[1]:
        table = block_table[rows[group]]
        count = (lengths[group] + block_size - 1) // block_size
        fits = True
        for i in range(count):
            owner = owners[table[i]]
            fits = fits and (owner == 0 or tags[groups[owner - 1]] == tags[group])
        if not fits:
            break
        for i in range(count):
            need = min(block_size, lengths[group] - i * block_size)
            owner = owners[table[i]]
            if owner:
                wanted[owner - 1] = max(wanted[owner - 1], need)
            else:
                blocks[listed], wanted[listed], groups[listed] = table[i], need, group
                listed += 1
                owners[table[i]] = listed
        group += 1
    kept = 0
    for i in range(listed):
        header = header_of(records, place, words, blocks[i], 0)
        if coded_tokens(header, tags[groups[i]]) < wanted[i]:
            blocks[kept], wanted[kept], groups[kept] = blocks[i], wanted[i], groups[i]
            kept += 1
    return group, kept
