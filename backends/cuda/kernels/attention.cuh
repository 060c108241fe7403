// What the kernels of attention share: arguments, and where a position lies.
#pragma once
#include "device.cuh"

struct AttendArgs {
    u64 q, out;            // [rows, heads, key_dim] T with strides, [rows, heads, value_dim] T
    u64 k, v;              // tokens with strides
    u64 tables, firsts;    // [runs, blocks_max] u32 page; or 0, and [runs] u32 token of position 0
    u64 tiles;             // [gridDim.x] Tile
    u64 partial;           // sums of splits, or 0
    u32 q_row, q_head, k_token, k_head, v_token, v_head;  // strides in elements
    u32 heads, group, pack;  // query heads; those that share a KV head; those of one tile
    u32 key_dim, value_dim, blocks_max, block_shift, window, splits;  // a block has 2^block_shift tokens
    float scale;
};

__device__ __forceinline__ u64 token_at(const AttendArgs& a, u32 run, u32 position) {
    if (!a.tables) return (u64)((const u32*)a.firsts)[run] + position;
    return token_in((const u32*)a.tables + (u64)run * a.blocks_max, position, a.block_shift);
}

// Positions [first, first + KEYS) of K or V into shared memory, columns [c, c + 8) of each at `place(row, c)`; zeros where there is
// nothing. A thread takes 16 bytes of every 64 columns of its rows, so that it looks a page up once a row.
template <int D, int KEYS, int THREADS, typename Place>
__device__ __forceinline__ void load_tile(bf16* to, const bf16* base, u32 stride, u32 dim, const AttendArgs& a, u32 run,
                                          u32 first, u32 end, Place place) {
    const u32 c = threadIdx.x % 8 * 8;
#pragma unroll
    for (u32 at = threadIdx.x / 8; at < KEYS; at += THREADS / 8) {
        const bool there = first + at < end;
        const bf16* row = base + token_at(a, run, there ? first + at : first) * stride;
#pragma unroll
        for (u32 d = c; d < D; d += 64) copy_async(to + place(at, d), row + (d < dim ? d : 0), there && d < dim);
    }
}
