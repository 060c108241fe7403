// Causal attention of prompts on Hopper: flash attention as in attention.cu, whose products are those of warp groups. Scores of the
// next positions are computed while values of these are summed, so that tensor cores do not wait for exponents.
#include "attention.cuh"
#include "groups.cuh"

const int GROUP_QUERIES = 128, GROUP_THREADS = 256, GROUP_KEYS = 128;

template <int DK, int DV>
__device__ __forceinline__ void attend_group(const AttendArgs& a) {
#if WARP_GROUPS
    const int NT = GROUP_KEYS / 8, QUERY_TILE = GROUP_QUERIES * TILE_COLUMNS, TILE = GROUP_KEYS * TILE_COLUMNS;
    DYNAMIC_SHARED(bf16, shared);
    bf16 *sq = shared, *sk = sq + GROUP_QUERIES * DK, *sv = sk + 2 * GROUP_KEYS * DK;
    const Part part = part_of<GROUP_KEYS>(a);
    const Tile& tile = part.tile;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 from = part.from, to = part.to;

    auto place = [](u32 row, u32 c) { return c / TILE_COLUMNS * TILE + swizzled(row, c % TILE_COLUMNS); };
    auto load_keys = [&](u32 j) {
        load_tile<DK, GROUP_KEYS, GROUP_THREADS>(sk + (j - from) % 2 * GROUP_KEYS * DK, part.k, a.k_token, a.key_dim, a, tile.run,
                                                 j * GROUP_KEYS, part.end, place);
    };
    auto load_values = [&](u32 j) {
        load_tile<DV, GROUP_KEYS, GROUP_THREADS>(sv + (j - from) % 2 * GROUP_KEYS * DV, part.v, a.v_token, a.value_dim, a, tile.run,
                                                 j * GROUP_KEYS, part.end, place);
    };
    const bf16* own_q = sq + warp / 4 * 64 * TILE_COLUMNS;
    float s[NT][4], o[DV / 8][4];
    auto queue_scores = [&](u32 j) {
        const bf16* keys = sk + (j - from) % 2 * GROUP_KEYS * DK;
#pragma unroll
        for (int k = 0; k < DK; k += 16) {
            const int column = k / TILE_COLUMNS, c = k % TILE_COLUMNS;
            group_product(s, tile_address(own_q + column * QUERY_TILE + c), tile_address(keys + column * TILE + c), k > 0);
        }
        group_commit();
    };
    u32 p[NT / 2][4];
    auto queue_values = [&](u32 j) {
        const bf16* values = sv + (j - from) % 2 * GROUP_KEYS * DV;
#pragma unroll
        for (int k = 0; k < GROUP_KEYS; k += 16)
            group_product_turned(o, p[k / 16], tile_address(values + k * TILE_COLUMNS, TILE * 2));
        group_commit();
    };
    // Weights in pairs, as the products want them.
    auto pack = [&] {
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            p[n / 2][0] = pair_bits(s[n][0], s[n][1]);
            p[n / 2][1] = pair_bits(s[n][2], s[n][3]);
            p[n / 2][2] = pair_bits(s[n + 1][0], s[n + 1][1]);
            p[n / 2][3] = pair_bits(s[n + 1][2], s[n + 1][3]);
        }
    };
    Softmax soft = NOTHING_SEEN;
    float keep[2];
    const u32 own_row = warp * 16 + lane / 4;
    auto to_weights = [&](u32 j) {
        const u32 at = j * GROUP_KEYS;
        const bool cut = at + GROUP_KEYS > tile.position + 1 || (a.window && at + a.window < part.end);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (cut) keep[h] = weigh(s, soft, h, a, tile.position, own_row, at, true, part.scale);
            else keep[h] = weigh(s, soft, h, a, tile.position, own_row, at, false, part.scale);
        }
    };

    auto query_place = [](u32 row, u32 c) { return c / TILE_COLUMNS * QUERY_TILE + swizzled(row, c % TILE_COLUMNS); };
    load_queries<DK, GROUP_QUERIES, GROUP_THREADS>(sq, a, part, query_place);
    load_keys(from);
    copies_commit();
    load_values(from);
    if (from + 1 < to) load_keys(from + 1);
    copies_commit();
#pragma unroll
    for (int n = 0; n < DV / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] = 0.0f;

    copies_wait<1>();
    shared_fence();
    __syncthreads();  // the queries and the first K are there
    group_fence();
    queue_scores(from);
    group_wait<0>();
    settle(s);
    to_weights(from);
    pack();
    u32 j = from;
    for (; j + 1 < to; ++j) {
        copies_wait<0>();
        shared_fence();
        __syncthreads();  // the next K and this V are there; this K and the last V are no longer read
        settle(o);
        settle(p);
        group_fence();
        queue_scores(j + 1);
        queue_values(j);
        // Meanwhile what comes next.
        if (j + 2 < to) load_keys(j + 2);
        load_values(j + 1);
        copies_commit();
        group_wait<1>();
        settle(s);
        to_weights(j + 1);
        group_wait<0>();
        settle(o);
#pragma unroll
        for (int n = 0; n < DV / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[n][i] *= keep[i / 2];
        pack();
    }
    copies_wait<0>();
    shared_fence();
    __syncthreads();  // the last V is there
    settle(o);
    settle(p);
    group_fence();
    queue_values(j);
    group_wait<0>();
    settle(o);

#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float total = row_sum(soft.total[h]);
        const u32 m = warp * 16 + lane / 4 + h * 8;
        if (m >= part.queries) continue;
        bf16* out = answer_of(a, part, m);
        const float factor = 1.0f / with_sink(a, part, m, total, soft.peak[h] * part.scale);
#pragma unroll
        for (int n = 0; n < DV / 8; ++n) {
            const u32 d = n * 8 + lane % 4 * 2;
            if (d < a.value_dim) *(u32*)(out + d) = pair_bits(o[n][h * 2] * factor, o[n][h * 2 + 1] * factor);
        }
    }
#endif
}

KERNEL(attend_group_64, AttendArgs, 256) { attend_group<64, 64>(a); }
KERNEL(attend_group_128, AttendArgs, 256) { attend_group<128, 128>(a); }
KERNEL(attend_group_192, AttendArgs, 256) { attend_group<192, 128>(a); }
