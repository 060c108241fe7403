// What the kernels of attention share: arguments, where a position lies, and the softmax.
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

// What one thread knows of the softmax of its two rows, 8 apart.
struct Softmax {
    float peak[2], total[2];  // of the scaled scores; of its own columns, see `row_sum`
};

#define NOTHING_SEEN {{MINUS_INFINITY, MINUS_INFINITY}, {0.0f, 0.0f}}

// The sum over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
    x += lane_xor(x, 1);
    return x + lane_xor(x, 2);
}

// Scores of positions [first, first + NT * 8) to weights, for one of the thread's rows: row `row` + 8 `h` of a tile that begins at
// `position`. Gives what earlier sums are multiplied by. `cut`: whether a mask passes through them.
template <int NT>
__device__ __forceinline__ float weigh(float (&s)[NT][4], Softmax& soft, int h, const AttendArgs& a, u32 position, u32 row,
                                       u32 first, bool cut, float scale) {
    const u32 at = position + (row + h * 8) / a.pack;
    float highest = MINUS_INFINITY;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float& x = s[n][h * 2 + i];
            const u32 p = first + n * 8 + threadIdx.x % 4 * 2 + i;
            if (cut && (p > at || (a.window && p + a.window <= at))) x = MINUS_INFINITY;
            highest = fmaxf(highest, x);
        }
    highest = fmaxf(highest, lane_xor(highest, 1));
    highest = fmaxf(highest, lane_xor(highest, 2));
    const float before = soft.peak[h], now = fmaxf(before, highest);
    // A row that has seen nothing yet keeps zeros.
    const float base = now == MINUS_INFINITY ? 0.0f : now * scale;
    const float keep = before == MINUS_INFINITY ? 0.0f : power_of_two(before * scale - base);
    soft.peak[h] = now;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float& x = s[n][h * 2 + i];
            x = power_of_two(x * scale - base);
            sum += x;
        }
    // Lanes of a row are summed at the end.
    soft.total[h] = soft.total[h] * keep + sum;
    return keep;
}
