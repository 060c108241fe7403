// Causal attention over the cache. `attend_*` is flash attention on tensor cores: a block takes some rows of one sequence
// and some heads that share K and V, so that a tile of queries reads each K and V once; keys may be split over blocks,
// whose sums `combine` joins. `attend_plain_*` takes any size and type, one warp a row and head.
#include "attention.cuh"

// The place of columns [c, c + 8) of a row of D columns in shared memory; `c` a multiple of 8. Pieces of 16 bytes are permuted by
// row, so that those of 8 rows below each other do not lie in the same banks.
template <int D>
__device__ __forceinline__ u32 place(u32 row, u32 c) {
    return row * D + (c ^ row % 8 * 8);
}

template <int DK, int DV, int WARPS, int MT, int BN>
__device__ void attend(const AttendArgs& a) {
    const int BM = WARPS * MT * 16, THREADS = WARPS * 32, NT = BN / 8;
    auto key_place = [](u32 row, u32 c) { return place<DK>(row, c); };
    auto value_place = [](u32 row, u32 c) { return place<DV>(row, c); };
    DYNAMIC_SHARED(bf16, shared);
    bf16 *sq = shared, *sk = sq + BM * DK, *sv = sk + BN * DK;
    const Part part = part_of<BN>(a);
    const Tile& tile = part.tile;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    // Tiles [from, to) of this split.
    const u32 each = (part.to - part.from + a.splits - 1) / a.splits;
    const u32 from = part.from + blockIdx.z * each, to = part.to < from + each ? part.to : from + each;
    auto load_keys = [&](u32 j) {
        load_tile<DK, BN, THREADS>(sk, part.k, a.k_token, a.key_dim, a, tile.run, j * BN, part.end, key_place);
    };
    auto load_values = [&](u32 j) {
        load_tile<DV, BN, THREADS>(sv, part.v, a.v_token, a.value_dim, a, tile.run, j * BN, part.end, value_place);
    };
    load_queries<DK, BM, THREADS>(sq, a, part, key_place);

    float o[MT][DV / 8][4];
    clear(o);
    Softmax soft[MT];
#pragma unroll
    for (int t = 0; t < MT; ++t) soft[t] = Softmax NOTHING_SEEN;

    if (from < to) load_keys(from);
    copies_commit();
    for (u32 j = from; j < to; ++j) {
        copies_wait<0>();
        __syncthreads();  // K is there, and V of the last tile is no longer read
        load_values(j);
        copies_commit();

        float s[MT][NT][4];
        clear(s);
#pragma unroll
        for (int k = 0; k < DK; k += 16) {
            u32 qf[MT][4];
#pragma unroll
            for (int t = 0; t < MT; ++t)
                load_matrices(qf[t], sq + place<DK>((warp * MT + t) * 16 + lane % 16, k + lane / 16 * 8));
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
                u32 kf[4];
                load_matrices(kf, sk + place<DK>(n * 8 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
                tile_products(s, n, qf, kf);
            }
        }

        // Whether a mask passes through this tile.
        const bool cut = (j + 1) * BN > tile.position + 1 || (a.window && j * BN + a.window < part.end);
#pragma unroll
        for (int t = 0; t < MT; ++t) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const u32 row = (warp * MT + t) * 16 + lane / 4;
                const float keep = weigh(s[t], soft[t], h, a, tile.position, row, j * BN, cut, part.scale);
#pragma unroll
                for (int n = 0; n < DV / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) o[t][n][h * 2 + i] *= keep;
            }
        }

        copies_wait<0>();
        __syncthreads();  // V is there, and K is no longer read
        if (j + 1 < to) load_keys(j + 1);
        copies_commit();
#pragma unroll
        for (int k = 0; k < BN; k += 16) {
            u32 pf[MT][4];
#pragma unroll
            for (int t = 0; t < MT; ++t) {
                const float(&left)[4] = s[t][k / 8], (&right)[4] = s[t][k / 8 + 1];
                pf[t][0] = pair_bits(left[0], left[1]);
                pf[t][1] = pair_bits(left[2], left[3]);
                pf[t][2] = pair_bits(right[0], right[1]);
                pf[t][3] = pair_bits(right[2], right[3]);
            }
#pragma unroll
            for (int n = 0; n < DV / 8; n += 2) {
                u32 vf[4];
                load_matrices_turned(vf, sv + place<DV>(k + lane % 16, n * 8 + lane / 16 * 8));
                tile_products(o, n, pf, vf);
            }
        }
    }
    copies_wait<0>();

#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const u32 m = (warp * MT + t) * 16 + lane / 4 + h * 8;
            const float total = row_sum(soft[t].total[h]);
            if (m >= part.queries) continue;
            if (a.partial) {
                // [tile][pack group][split][query]: peak, total, value
                u64 at = (((u64)blockIdx.x * gridDim.y + blockIdx.y) * a.splits + blockIdx.z) * BM + m;
                float* sums = (float*)a.partial + at * (a.value_dim + 2);
                if (lane % 4 == 0) sums[0] = soft[t].peak[h], sums[1] = total;
#pragma unroll
                for (int n = 0; n < DV / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        u32 d = n * 8 + lane % 4 * 2 + i;
                        if (d < a.value_dim) sums[2 + d] = o[t][n][h * 2 + i];
                    }
                continue;
            }
            bf16* out = answer_of(a, part, m);
            const float factor = 1.0f / with_sink(a, part, m, total, soft[t].peak[h] * part.scale);
#pragma unroll
            for (int n = 0; n < DV / 8; ++n) {
                u32 d = n * 8 + lane % 4 * 2;
                if (d < a.value_dim) *(u32*)(out + d) = pair_bits(o[t][n][h * 2] * factor, o[t][n][h * 2 + 1] * factor);
            }
        }
}

// Prompts: 128 queries a block; 64 where a processor's shared memory would have room for one such block only (`_small`).
// Generation: 16 queries, keys split over blocks.
KERNEL(attend_64, AttendArgs, 128) { attend<64, 64, 4, 2, 64>(a); }
KERNEL(attend_128, AttendArgs, 128) { attend<128, 128, 4, 2, 64>(a); }
KERNEL(attend_128_small, AttendArgs, 128) { attend<128, 128, 4, 1, 64>(a); }
KERNEL(attend_192, AttendArgs, 128) { attend<192, 128, 4, 1, 64>(a); }
KERNEL(attend_256, AttendArgs, 128) { attend<256, 256, 4, 1, 32>(a); }
KERNEL(attend_few_64, AttendArgs, 32) { attend<64, 64, 1, 1, 64>(a); }
KERNEL(attend_few_128, AttendArgs, 32) { attend<128, 128, 1, 1, 64>(a); }
KERNEL(attend_few_192, AttendArgs, 32) { attend<192, 128, 1, 1, 64>(a); }
KERNEL(attend_few_256, AttendArgs, 32) { attend<256, 256, 1, 1, 32>(a); }

struct CombineArgs {
    u64 partial, tiles, out, sinks;  // as in AttendArgs; queries of a block [queries_max]
    u32 heads, pack, value_dim, splits, queries_max;
    u32 compact;  // whether rows of `out` are tiles, in order
    float scale;
};

// One warp a query; grid (tiles, groups of heads).
KERNEL(combine, CombineArgs, 256) {
    const Tile tile = ((const Tile*)a.tiles)[blockIdx.x];
    u32 lane = threadIdx.x % 32, width = a.value_dim + 2;
    for (u32 m = threadIdx.x / 32; m < tile.rows * a.pack; m += blockDim.x / 32) {
        const float* sums =
            (const float*)a.partial +
            (((u64)blockIdx.x * gridDim.y + blockIdx.y) * a.splits * a.queries_max + m) * width;
        u64 stride = (u64)a.queries_max * width;
        float peak = MINUS_INFINITY, total = 0.0f;
        for (u32 s = 0; s < a.splits; ++s) peak = fmaxf(peak, sums[s * stride]);
        for (u32 s = 0; s < a.splits; ++s)
            if (sums[s * stride + 1] > 0.0f) total += sums[s * stride + 1] * expf((sums[s * stride] - peak) * a.scale);
        u64 row = a.compact ? blockIdx.x : tile.row + m / a.pack, head = blockIdx.y * a.pack + m % a.pack;
        if (head >= a.heads) continue;
        if (a.sinks) total += expf(((const float*)a.sinks)[head] - peak * a.scale);
        for (u32 d = lane; d < a.value_dim; d += 32) {
            float value = 0.0f;
            for (u32 s = 0; s < a.splits; ++s)
                if (sums[s * stride + 1] > 0.0f)
                    value += sums[s * stride + 2 + d] * expf((sums[s * stride] - peak) * a.scale);
            ((bf16*)a.out)[(row * a.heads + head) * a.value_dim + d] = down<bf16>(value / total);
        }
    }
}

const int VALUES_MAX = 16;  // of a lane: values of at most 512 elements

// One warp a row and head; a tile is one row. q is held in shared memory.
template <typename T>
__device__ void attend_plain(const AttendArgs& a) {
    DYNAMIC_SHARED(float, held);
    const Tile tile = ((const Tile*)a.tiles)[blockIdx.x];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* q = held + warp * a.key_dim;
    for (u32 head = warp; head < a.heads; head += blockDim.x / 32) {
        const T* from = (const T*)a.q + (u64)tile.row * a.q_row + (u64)head * a.q_head;
        for (u32 i = lane; i < a.key_dim; i += 32) q[i] = up(from[i]);
        warp_sync();
        const T *k = (const T*)a.k + (u64)(head / a.group) * a.k_head, *v = (const T*)a.v + (u64)(head / a.group) * a.v_head;
        u32 end = tile.position + 1, first = a.window && end > a.window ? end - a.window : 0;
        float value[VALUES_MAX], peak = MINUS_INFINITY, total = 0.0f;
        for (int i = 0; i < VALUES_MAX; ++i) value[i] = 0.0f;
        for (u32 base = first; base < end; base += 32) {
            u32 p = base + lane;
            float score = MINUS_INFINITY;
            if (p < end) {
                const T* key = k + token_at(a, tile.run, p) * a.k_token;
                float sum = 0.0f;
                for (u32 i = 0; i < a.key_dim; ++i) sum += q[i] * up(key[i]);
                score = sum * a.scale;
            }
            float now = fmaxf(peak, warp_max(score)), keep = peak == MINUS_INFINITY ? 0.0f : expf(peak - now);
            float weight = p < end ? expf(score - now) : 0.0f;
            peak = now;
            total = total * keep + warp_sum(weight);
            for (int i = 0; i < VALUES_MAX; ++i) value[i] *= keep;
            for (u32 other = 0; other < 32 && base + other < end; ++other) {
                float w = lane_get(weight, other);
                const T* row = v + token_at(a, tile.run, base + other) * a.v_token;
                for (u32 i = lane, at = 0; i < a.value_dim; i += 32, ++at) value[at] += w * up(row[i]);
            }
        }
        if (a.sinks) total += expf(((const float*)a.sinks)[head] - peak);
        T* out = (T*)a.out + ((u64)tile.row * a.heads + head) * a.value_dim;
        for (u32 i = lane, at = 0; i < a.value_dim; i += 32, ++at) out[i] = down<T>(value[at] / total);
        warp_sync();
    }
}

KERNEL(attend_plain_f32, AttendArgs, 128) { attend_plain<float>(a); }
KERNEL(attend_plain_bf16, AttendArgs, 128) { attend_plain<bf16>(a); }
