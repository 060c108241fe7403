// What the kernels of attention share: arguments, what a block attends, where a position lies, and the softmax.
#pragma once
#include "device.cuh"

const float LOG2_E = 1.4426950408889634f;

struct AttendArgs {
    u64 q, out;            // [rows, heads, key_dim] T with strides, [rows, heads, value_dim] T
    u64 k, v;              // tokens with strides
    u64 tables, firsts;    // [runs, blocks_max] u32 page; or 0, and [runs] u32 token of position 0
    u64 tiles;             // [gridDim.x] Tile
    u64 partial;           // sums of splits, or 0
    u64 sinks;             // [heads] f32, or 0
    u32 q_row, q_head, k_token, k_head, v_token, v_head;  // strides in elements
    u32 heads, group, pack;  // query heads; those that share a KV head; those of one tile
    u32 key_dim, value_dim, blocks_max, block_shift, window, splits;  // a block has 2^block_shift tokens
    float scale;
};

__device__ __forceinline__ u64 token_at(const AttendArgs& a, u32 run, u32 position) {
    if (!a.tables) return (u64)((const u32*)a.firsts)[run] + position;
    return token_in((const u32*)a.tables + (u64)run * a.blocks_max, position, a.block_shift);
}

// What a block attends: the rows of a tile, for some heads that share K and V.
struct Part {
    Tile tile;
    u32 head_first, queries;  // the first of its heads; rows times heads
    const bf16 *k, *v;        // of the head that they share
    u32 end, from, to;        // behind the last position that a row sees; tiles of KEYS positions that rows see
    float scale;              // of scores, to exponents of base 2
};

template <int KEYS>
__device__ __forceinline__ Part part_of(const AttendArgs& a) {
    Part part;
    part.tile = ((const Tile*)a.tiles)[blockIdx.x];
    part.head_first = blockIdx.y * a.pack;
    part.queries = part.tile.rows * a.pack;
    const u64 kv_head = part.head_first / a.group;
    part.k = (const bf16*)a.k + kv_head * a.k_head;
    part.v = (const bf16*)a.v + kv_head * a.v_head;
    const u32 position = part.tile.position;
    const u32 first = a.window && position + 1 > a.window ? position + 1 - a.window : 0;
    part.end = position + part.tile.rows;
    part.from = first / KEYS, part.to = (part.end + KEYS - 1) / KEYS;
    part.scale = a.scale * LOG2_E;
    return part;
}

// Whether a row at position `at` does not see position `p`.
__device__ __forceinline__ bool hidden(const AttendArgs& a, u32 at, u32 p) {
    return p > at || (a.window && p + a.window <= at);
}

// The queries of a block into shared memory, columns [c, c + 8) of each at `place(row, c)`; zeros where there is nothing.
template <int D, int QUERIES, int THREADS, typename Place>
__device__ __forceinline__ void load_queries(bf16* to, const AttendArgs& a, const Part& part, Place place) {
    for (u32 i = threadIdx.x; i < QUERIES * D / 8; i += THREADS) {
        const u32 m = i / (D / 8), c = i % (D / 8) * 8;
        const bool there = m < part.queries && c < a.key_dim;
        const u32 row = part.tile.row + (there ? m / a.pack : 0), head = part.head_first + (there ? m % a.pack : 0);
        const bf16* q = (const bf16*)a.q + (u64)row * a.q_row + (u64)head * a.q_head;
        copy_async(to + place(m, c), q + (there ? c : 0), there);
    }
}

// Where the answer to query `m` of a block goes.
__device__ __forceinline__ bf16* answer_of(const AttendArgs& a, const Part& part, u32 m) {
    const u64 row = part.tile.row + m / a.pack, head = part.head_first + m % a.pack;
    return (bf16*)a.out + (row * a.heads + head) * a.value_dim;
}

// What the weights of query `m` of a block, two to a score less `base`, add up to with that of its head's sink, which has no value. A
// sink far above all scores makes it infinite, and the answer zeros.
__device__ __forceinline__ float with_sink(const AttendArgs& a, const Part& part, u32 m, float total, float base) {
    if (!a.sinks) return total;
    return total + power_of_two(((const float*)a.sinks)[part.head_first + m % a.pack] * LOG2_E - base);
}

// Positions [first, first + KEYS) of K or V into shared memory, columns [c, c + 8) of each at `place(row, c)`; zeros where there is
// nothing. Each of THREADS takes 16 bytes of every 64 columns of its rows, so that it looks a page up once a row.
template <int D, int KEYS, int THREADS, typename Place>
__device__ __forceinline__ void load_tile(bf16* to, const bf16* base, u32 stride, u32 dim, const AttendArgs& a, u32 run,
                                          u32 first, u32 end, Place place, u32 thread = threadIdx.x) {
    const u32 c = thread % 8 * 8;
#pragma unroll
    for (u32 at = thread / 8; at < KEYS; at += THREADS / 8) {
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
            if (cut && hidden(a, at, p)) x = MINUS_INFINITY;
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
