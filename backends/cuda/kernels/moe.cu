// Mixtures of experts: which experts a row takes, the rows of every expert side by side, and the sum of a row's experts.
#include "product.cuh"

const int EXPERTS_MAX = 512;
const int TOP_MAX = 32;

struct RouteArgs {
    u64 scores;            // [rows, experts] f32 products
    u64 bias, choice_bias; // [experts] of `bias_type`, of the scores, or 0; [experts] f32 for the choice, or 0
    u64 experts, weights;  // [rows, top_k] u32 and f32, in ascending order of expert
    u32 count, top_k, sigmoid, groups, groups_used, normalise, bias_type;
    float normalise_eps, scale;
};

// One warp a row and block. Of equal choices the lower expert is taken.
KERNEL(route, RouteArgs, 32) {
    __shared__ float score[EXPERTS_MAX], choice[EXPERTS_MAX], group[EXPERTS_MAX];
    u32 lane = threadIdx.x, row = blockIdx.x;
    const float* products = (const float*)a.scores + (u64)row * a.count;
    // Up to the choice a lane sees its own experts only.
    for (u32 e = lane; e < a.count; e += 32) score[e] = products[e] + (a.bias ? scale_at(a.bias, e, a.bias_type) : 0.0f);
    if (a.sigmoid) {
        for (u32 e = lane; e < a.count; e += 32) score[e] = 1.0f / (1.0f + expf(-score[e]));
    } else {
        float peak = MINUS_INFINITY, total = 0.0f;
        for (u32 e = lane; e < a.count; e += 32) peak = fmaxf(peak, score[e]);
        peak = warp_max(peak);
        for (u32 e = lane; e < a.count; e += 32) total += expf(score[e] - peak);
        total = warp_sum(total);
        for (u32 e = lane; e < a.count; e += 32) score[e] = expf(score[e] - peak) / total;
    }
    for (u32 e = lane; e < a.count; e += 32) choice[e] = score[e] + (a.choice_bias ? ((const float*)a.choice_bias)[e] : 0.0f);
    warp_sync();
    if (a.groups > 1) {
        u32 each = a.count / a.groups;
        for (u32 g = lane; g < a.groups; g += 32) {
            float best = MINUS_INFINITY, second = MINUS_INFINITY;
            for (u32 e = g * each; e < (g + 1) * each; ++e) {
                float x = choice[e];
                if (x > best) second = best, best = x;
                else if (x > second) second = x;
            }
            group[g] = each > 1 ? best + second : best;
        }
        warp_sync();
        for (u32 g = lane; g < a.groups; g += 32) {
            u32 better = 0;
            for (u32 o = 0; o < a.groups; ++o) better += group[o] > group[g] || (group[o] == group[g] && o < g);
            if (better >= a.groups_used)
                for (u32 e = g * each; e < (g + 1) * each; ++e) choice[e] = MINUS_INFINITY;
        }
        warp_sync();
    }
    // The rank of an expert among all: taken when below top_k.
    u32* experts = (u32*)a.experts + (u64)row * a.top_k;
    float* weights = (float*)a.weights + (u64)row * a.top_k;
    u32 taken = 0;
    float total = 0.0f;
    for (u32 base = 0; base < a.count; base += 32) {
        u32 e = base + lane, better = 0;
        if (e < a.count)
            for (u32 o = 0; o < a.count; ++o) better += choice[o] > choice[e] || (choice[o] == choice[e] && o < e);
        bool mine = e < a.count && better < a.top_k;
        u32 all = lane_ballot(mine);
        if (mine) {
            u32 place = taken + __popc(all & ((1u << lane) - 1));
            experts[place] = e;
            weights[place] = score[e];
            total += score[e];
        }
        taken += __popc(all);
    }
    total = warp_sum(total);
    warp_sync();
    float factor = a.scale / (a.normalise ? total + a.normalise_eps : 1.0f);
    for (u32 i = lane; i < a.top_k; i += 32) weights[i] *= factor;
}

struct RoutesArgs {
    u64 experts;              // [rows, top_k] u32, of `route`
    u64 slots, sources, tiles;  // [rows * top_k] u32: place of (row, k); row at a place; [tiles_max] RowTile
    u32 rows, top_k, count, tile, tiles_max;
};

const int ROUTE_WARPS = 16;
const u32 NO_EXPERT = 0xffffffffu;

// Places: all rows of expert 0 in order, then those of expert 1, ... and tiles over them. One block; each warp takes neighbours among
// the choices, counts them, and puts them behind those of earlier warps.
KERNEL(routes, RoutesArgs, 512) {
    __shared__ u32 places[ROUTE_WARPS][EXPERTS_MAX], begin[EXPERTS_MAX + 1], tile_begin[EXPERTS_MAX + 1];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, total = a.rows * a.top_k;
    const u32* experts = (const u32*)a.experts;
    const u32 lower = (1u << lane) - 1, chunk = (total + ROUTE_WARPS * 32 - 1) / (ROUTE_WARPS * 32) * 32;
    const u32 from = warp * chunk, to = from + chunk < total ? from + chunk : total;
    for (u32 i = threadIdx.x; i < ROUTE_WARPS * a.count; i += blockDim.x) places[i / a.count][i % a.count] = 0;
    __syncthreads();
    for (u32 base = from; base < to; base += 32) {
        u32 e = base + lane < to ? experts[base + lane] : NO_EXPERT, same = lane_same(e);
        if (e != NO_EXPERT && (same & lower) == 0) places[warp][e] += __popc(same);
        warp_sync();
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < a.count; e += blockDim.x) {
        u32 sum = 0;
        for (u32 w = 0; w < ROUTE_WARPS; ++w) {
            u32 own = places[w][e];
            places[w][e] = sum;
            sum += own;
        }
        begin[e + 1] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        begin[0] = tile_begin[0] = 0;
        for (u32 e = 0; e < a.count; ++e) {
            tile_begin[e + 1] = tile_begin[e] + (begin[e + 1] + a.tile - 1) / a.tile;
            begin[e + 1] += begin[e];
        }
    }
    __syncthreads();
    for (u32 base = from; base < to; base += 32) {
        u32 e = base + lane < to ? experts[base + lane] : NO_EXPERT, same = lane_same(e);
        if (e != NO_EXPERT) {
            u32 place = begin[e] + places[warp][e] + __popc(same & lower);
            ((u32*)a.slots)[base + lane] = place;
            ((u32*)a.sources)[place] = (base + lane) / a.top_k;
        }
        warp_sync();
        if (e != NO_EXPERT && (same & lower) == 0) places[warp][e] += __popc(same);
        warp_sync();
    }
    RowTile* tiles = (RowTile*)a.tiles;
    for (u32 e = warp; e < a.count; e += warps) {
        for (u32 i = lane; i < tile_begin[e + 1] - tile_begin[e]; i += 32) {
            u32 first = begin[e] + i * a.tile, left = begin[e + 1] - first;
            RowTile tile = {e, first, left < a.tile ? left : a.tile};
            tiles[tile_begin[e] + i] = tile;
        }
    }
    RowTile none = {0, 0, 0};
    for (u32 i = tile_begin[a.count] + threadIdx.x; i < a.tiles_max; i += blockDim.x) tiles[i] = none;
}

struct GatherSumArgs {
    u64 parts, slots, weights, shared, out;  // [rows * top_k, width] f32; [rows, top_k] u32, f32; [rows, width] f32 or 0; [rows, width] T
    u32 top_k, width, out_f32;
};

// A row's experts by their weights in ascending order of expert, the shared one last. One block a row.
template <typename T>
__device__ void gather_sum(const GatherSumArgs& a) {
    const u32* slots = (const u32*)a.slots + (u64)blockIdx.x * a.top_k;
    const float* weights = (const float*)a.weights + (u64)blockIdx.x * a.top_k;
    for (u32 i = threadIdx.x; i < a.width; i += blockDim.x) {
        float sum = 0.0f;
        for (u32 k = 0; k < a.top_k; ++k) sum += weights[k] * ((const float*)a.parts)[(u64)slots[k] * a.width + i];
        u64 at = (u64)blockIdx.x * a.width + i;
        if (a.shared) sum += ((const float*)a.shared)[at];
        if (a.out_f32) ((float*)a.out)[at] = sum;
        else ((T*)a.out)[at] = down<T>(sum);
    }
}

KERNEL(gather_sum_f32, GatherSumArgs, 256) { gather_sum<float>(a); }
KERNEL(gather_sum_bf16, GatherSumArgs, 256) { gather_sum<bf16>(a); }
