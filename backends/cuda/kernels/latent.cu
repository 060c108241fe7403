// Generation with multi-head latent attention, absorbed: queries are brought to the latents' space, so that the cache is
// read as it lies, once for all heads of a block, and nothing is expanded.
#include "device.cuh"

const int ABSORBED_ROWS = 8;  // rows that share one read of a head's matrix

struct AbsorbArgs {
    u64 x, w, rows, out;  // see the kernels; [count] u32: row of the batch
    u32 count, heads, inputs, outputs;
    u32 x_head, x_offset;  // elements from one head to the next, and before the first, in a row of x
    u32 x_row;             // elements of a row of x
};

// Queries in the latents' space: x [*, x_row] (by `rows`), w [heads, inputs, outputs], out [count, heads, outputs].
// Grid: groups of rows, heads, pieces of 512 outputs; a thread has two. inputs is at most 256.
KERNEL(absorb_keys, AbsorbArgs, 256) {
    __shared__ float held[ABSORBED_ROWS][256];
    u32 first = blockIdx.x * ABSORBED_ROWS, head = blockIdx.y;
    for (u32 i = threadIdx.x; i < ABSORBED_ROWS * a.inputs; i += blockDim.x) {
        u32 m = i / a.inputs, d = i % a.inputs;
        float x = 0.0f;
        if (first + m < a.count) {
            u64 row = ((const u32*)a.rows)[first + m];
            x = up(((const bf16*)a.x)[row * a.x_row + (u64)head * a.x_head + a.x_offset + d]);
        }
        held[m][d] = x;
    }
    __syncthreads();
    u32 column = blockIdx.z * 512 + threadIdx.x * 2;
    if (column >= a.outputs) return;
    const bf16* w = (const bf16*)a.w + (u64)head * a.inputs * a.outputs + column;
    float sums[ABSORBED_ROWS][2];
#pragma unroll
    for (int m = 0; m < ABSORBED_ROWS; ++m) sums[m][0] = sums[m][1] = 0.0f;
#pragma unroll 8
    for (u32 d = 0; d < a.inputs; ++d) {
        u32 pair = *(const u32*)(w + (u64)d * a.outputs);
        float low = bits_float(pair << 16), high = bits_float(pair & 0xffff0000u);
#pragma unroll
        for (int m = 0; m < ABSORBED_ROWS; ++m) sums[m][0] += held[m][d] * low, sums[m][1] += held[m][d] * high;
    }
#pragma unroll
    for (int m = 0; m < ABSORBED_ROWS; ++m)
        if (first + m < a.count) {
            u64 at = ((u64)(first + m) * a.heads + head) * a.outputs + column;
            *(u32*)((bf16*)a.out + at) = pair_bits(sums[m][0], sums[m][1]);
        }
}

// Values from sums of latents: x [count, heads, inputs], w [heads, outputs, inputs], out [*, heads, outputs] (by `rows`).
// Grid: groups of rows, heads. A warp an output; inputs is a multiple of 8.
KERNEL(absorb_values, AbsorbArgs, 256) {
    u32 first = blockIdx.x * ABSORBED_ROWS, head = blockIdx.y, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (u32 n = threadIdx.x / 32; n < a.outputs; n += warps) {
        const bf16* w = (const bf16*)a.w + ((u64)head * a.outputs + n) * a.inputs;
        float sums[ABSORBED_ROWS];
#pragma unroll
        for (int m = 0; m < ABSORBED_ROWS; ++m) sums[m] = 0.0f;
        for (u32 d = lane * 8; d < a.inputs; d += 256) {
            float weight[8];
            load8(weight, w + d);
#pragma unroll
            for (int m = 0; m < ABSORBED_ROWS; ++m) {
                if (first + m >= a.count) break;
                float x[8];
                load8(x, (const bf16*)a.x + ((u64)(first + m) * a.heads + head) * a.inputs + d);
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[m] += x[i] * weight[i];
            }
        }
#pragma unroll
        for (int m = 0; m < ABSORBED_ROWS; ++m) {
            if (first + m >= a.count) break;
            float sum = warp_sum(sums[m]);
            u64 row = ((const u32*)a.rows)[first + m];
            if (lane == 0) ((bf16*)a.out)[(row * a.heads + head) * a.outputs + n] = down<bf16>(sum);
        }
    }
}

struct LatentArgs {
    u64 q_latent, q;      // [tiles, heads, latent] of absorb_keys; [*, q_row] with a head's rope part at q_offset
    u64 latents, ropes;   // planes: [tokens, latent], [tokens, rope]
    u64 tables, tiles;    // [runs, blocks_max] u32 page; [gridDim.x] Tile of one row
    u64 out, partial;     // [tiles, heads, latent]; sums of splits as `combine` reads them, or 0
    u32 heads, latent, rope, q_row, q_head, q_offset, blocks_max, block_shift, splits;
    float scale;
};

// Positions of a tile, sizes of latent and rope key at most, warps.
const int LN = 32, LATENT_MAX = 512, ROPE_MAX = 64, LWARPS = 8;
const int LS = LATENT_MAX + ROPE_MAX + 8;  // a padded row: latent, rope key

__device__ __forceinline__ void load_latents(bf16* to, const LatentArgs& a, u32 run, u32 first, u32 end) {
    // Rope keys stand behind the latent, both in whole 16s: columns between are zeros.
    const u32 chunks = (a.latent + 15) / 16 * 2, all = chunks + (a.rope + 15) / 16 * 2;
    for (u32 i = threadIdx.x; i < LN * all; i += LWARPS * 32) {
        u32 at = i / all, chunk = i % all;
        bool is_rope = chunk >= chunks;
        u32 c = (is_rope ? chunk - chunks : chunk) * 8, width = is_rope ? a.rope : a.latent;
        bool there = first + at < end && c < width;
        u32 position = there ? first + at : first;
        u64 token = token_in((const u32*)a.tables + (u64)run * a.blocks_max, position, a.block_shift);
        const bf16* from = (const bf16*)(is_rope ? a.ropes : a.latents) + token * width + (there ? c : 0);
        copy_async(to + at * LS + chunk * 8, from, there);
    }
}

// Grid: rows, groups of MT * 16 heads, splits of the positions. Scores of a tile: warps have 8 positions each and one half
// of the inputs; sums: warps have 64 columns of the latent each.
template <int MT>
__device__ void attend_latent(const LatentArgs& a) {
    const int M = MT * 16, SS = LN + 4, PS = LN + 8, NT = LATENT_MAX / LWARPS / 8;
    DYNAMIC_SHARED(bf16, shared);
    bf16 *sq = shared, *sk = sq + M * LS;
    float *scores = (float*)(sk + 2 * LN * LS), *peaks = scores + 2 * M * SS, *totals = peaks + M, *keeps = totals + M;
    bf16* weights = (bf16*)(keeps + M);
    const Tile tile = ((const Tile*)a.tiles)[blockIdx.x];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 head_first = blockIdx.y * M, end = tile.position + 1;
    const u32 latent16 = (a.latent + 15) / 16 * 16, inputs = latent16 + (a.rope + 15) / 16 * 16;
    u32 from = 0, to = (end + LN - 1) / LN;
    const u32 each = (to + a.splits - 1) / a.splits;
    from = blockIdx.z * each;
    to = to < from + each ? to : from + each;

    for (u32 i = threadIdx.x; i < M * inputs / 8; i += LWARPS * 32) {
        u32 m = i / (inputs / 8), c = i % (inputs / 8) * 8, head = head_first + m;
        bool is_rope = c >= latent16;
        u32 d = is_rope ? c - latent16 : c;
        bool there = head < a.heads && d < (is_rope ? a.rope : a.latent);
        const bf16* source = (const bf16*)a.q_latent;
        if (there)
            source = is_rope ? (const bf16*)a.q + (u64)tile.row * a.q_row + (u64)head * a.q_head + a.q_offset + d
                             : (const bf16*)a.q_latent + ((u64)blockIdx.x * a.heads + head) * a.latent + d;
        copy_async(sq + m * LS + c, source, there);
    }
    for (int m = threadIdx.x; m < M; m += LWARPS * 32) peaks[m] = MINUS_INFINITY, totals[m] = 0.0f;
    float o[MT][NT][4];
#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[t][n][i] = 0.0f;
    const float scale = a.scale * 1.4426950408889634f;

    if (from < to) load_latents(sk, a, tile.run, from * LN, end);
    copies_commit();
    for (u32 j = from; j < to; ++j) {
        bf16* keys = sk + (j - from) % 2 * LN * LS;
        copies_wait<0>();
        __syncthreads();  // this tile is there, and the other is no longer read
        if (j + 1 < to) load_latents(sk + (j + 1 - from) % 2 * LN * LS, a, tile.run, (j + 1) * LN, end);
        copies_commit();

        // Scores of positions [8 n, 8 n + 8) over half of the inputs, in steps of 16.
        {
            const int n = warp % 4, half = warp / 4;
            const u32 steps = inputs / 16, k_from = half * ((steps + 1) / 2), k_to = half ? steps : (steps + 1) / 2;
            float s[MT][4];
#pragma unroll
            for (int t = 0; t < MT; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[t][i] = 0.0f;
            // Two steps of keys in one load: matrices of k, k + 8, k + 16, k + 24.
            for (u32 step = k_from; step < k_to; step += 2) {
                const bool second = step + 1 < k_to;
                const u32 k = step * 16;
                u32 kf[4];
                load_matrices(kf, keys + (n * 8 + lane % 8) * LS + k + (lane / 16 && !second ? 0 : lane / 16 * 16) + lane / 8 % 2 * 8);
                u32 low[2] = {kf[0], kf[1]}, high[2] = {kf[2], kf[3]};
#pragma unroll
                for (int t = 0; t < MT; ++t) {
                    u32 qf[4];
                    const bf16* row = sq + (t * 16 + lane / 8 % 2 * 8 + lane % 8) * LS + k + lane / 16 * 8;
                    load_matrices(qf, row);
                    tile_product(s[t], qf, low);
                    if (second) {
                        load_matrices(qf, row + 16);
                        tile_product(s[t], qf, high);
                    }
                }
            }
#pragma unroll
            for (int t = 0; t < MT; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    scores[(half * M + t * 16 + lane / 4 + i / 2 * 8) * SS + n * 8 + lane % 4 * 2 + i % 2] = s[t][i];
        }
        __syncthreads();

        // Softmax: a warp a head, a lane a position.
        for (int m = warp; m < M; m += LWARPS) {
            float x = scores[m * SS + lane] + scores[(M + m) * SS + lane];
            if (j * LN + lane >= end) x = MINUS_INFINITY;
            const float before = peaks[m], now = fmaxf(before, warp_max(x));
            x = power_of_two((x - now) * scale);
            const float keep = before == MINUS_INFINITY ? 0.0f : power_of_two((before - now) * scale);
            const float sum = warp_sum(x);
            weights[m * PS + lane] = down<bf16>(x);
            warp_sync();  // all lanes have read the peak
            if (lane == 0) peaks[m] = now, totals[m] = totals[m] * keep + sum, keeps[m] = keep;
        }
        __syncthreads();

#pragma unroll
        for (int t = 0; t < MT; ++t) {
            const float low = keeps[t * 16 + lane / 4], high = keeps[t * 16 + lane / 4 + 8];
#pragma unroll
            for (int n = 0; n < NT; ++n) o[t][n][0] *= low, o[t][n][1] *= low, o[t][n][2] *= high, o[t][n][3] *= high;
        }
#pragma unroll
        for (int k = 0; k < LN; k += 16) {
            u32 pf[MT][4];
#pragma unroll
            for (int t = 0; t < MT; ++t)
                load_matrices(pf[t], weights + (t * 16 + lane / 8 % 2 * 8 + lane % 8) * PS + k + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
                const u32 column = warp * (LATENT_MAX / LWARPS) + n * 8;
                if (column >= latent16) break;  // the same for a warp
                u32 vf[4];
                load_matrices_turned(vf, keys + (k + lane / 8 % 2 * 8 + lane % 8) * LS + column + lane / 16 * 8);
                tile_products(o, n, pf, vf);
            }
        }
    }
    copies_wait<0>();
    __syncthreads();

#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int m = t * 16 + lane / 4 + h * 8;
            if (head_first + m >= a.heads) continue;
            const float factor = a.partial ? 1.0f : 1.0f / totals[m];
            float* sums = (float*)a.partial +
                          ((((u64)blockIdx.x * gridDim.y + blockIdx.y) * a.splits + blockIdx.z) * M + m) * (a.latent + 2);
            if (a.partial && warp == 0 && lane % 4 == 0) sums[0] = peaks[m], sums[1] = totals[m];
            bf16* out = (bf16*)a.out + ((u64)blockIdx.x * a.heads + head_first + m) * a.latent;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const u32 d = warp * (LATENT_MAX / LWARPS) + n * 8 + lane % 4 * 2;
                if (d >= a.latent) continue;
                if (a.partial) sums[2 + d] = o[t][n][h * 2], sums[3 + d] = o[t][n][h * 2 + 1];
                else *(u32*)(out + d) = pair_bits(o[t][n][h * 2] * factor, o[t][n][h * 2 + 1] * factor);
            }
        }
}

KERNEL(attend_latent_16, LatentArgs, 256) { attend_latent<1>(a); }
KERNEL(attend_latent_32, LatentArgs, 256) { attend_latent<2>(a); }
