// What all products with weights share: whose rows meet which weights, and where sums go.
#pragma once
#include "quant.cuh"

// Rows of x that meet one expert; `count` 0: nothing to do.
struct RowTile {
    u32 expert, first, count;
};

struct ProductArgs {
    Quant quant;               // of expert 0
    u64 w;                     // [experts, n, k] T, or 0: quantised
    u64 x, out, bias;          // [*, k] T, [*, out_stride] T or f32, [experts, out_stride] T or 0
    u64 rows;                  // [m] u32: row of x for each row of out, or 0: the same
    u64 tiles;                 // [gridDim.y] RowTile, or 0: rows [0, m) in order, expert 0
    u64 codes_expert, scales_expert;  // bytes of codes, elements of scales from one expert to the next
    u32 m, n, k, out_stride, out_f32;
};

__device__ __forceinline__ RowTile tile_of(const ProductArgs& a, u32 size) {
    if (a.tiles) return ((const RowTile*)a.tiles)[blockIdx.y];
    u32 first = blockIdx.y * size;
    RowTile tile = {0, first, a.m - first < size ? a.m - first : size};
    return tile;
}

__device__ __forceinline__ Quant quant_of(const ProductArgs& a, u32 expert) {
    Quant q = a.quant;
    u64 item = q.scale_type == SCALE_F32 ? 4 : 2;
    q.codes += expert * a.codes_expert;
    q.scales += expert * a.scales_expert * item;
    q.biases += expert * a.scales_expert * item;
    return q;
}

__device__ __forceinline__ u32 row_of(const ProductArgs& a, u32 row) {
    return a.rows ? ((const u32*)a.rows)[row] : row;
}

// The biases of a block's expert, if it has any. The expert is looked up again: it is not to hold a register while sums are made.
template <typename T>
__device__ __forceinline__ const T* bias_of(const ProductArgs& a) {
    if (!a.bias || !a.tiles) return (const T*)a.bias;
    return (const T*)a.bias + (u64)((const RowTile*)a.tiles)[only_here(blockIdx.y)].expert * a.out_stride;
}

template <typename T>
__device__ __forceinline__ void put(const ProductArgs& a, const T* bias, u32 row, u32 n, float x) {
    if (bias) x += up(bias[n]);
    u64 at = (u64)row * a.out_stride + n;
    if (a.out_f32) ((float*)a.out)[at] = x;
    else ((T*)a.out)[at] = down<T>(x);
}

// Tiles of 16 x 8 sums of a warp, whose first is of row `m_first` of the tile and output `n_first`.
template <int MT, int NT>
__device__ __forceinline__ void put_tiles(const ProductArgs& a, const RowTile& tile, u32 m_first, u32 n_first,
                                          const float (&sums)[MT][NT][4]) {
    u32 lane = threadIdx.x % 32;
    const bf16* bias = bias_of<bf16>(a);
#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                u32 m = m_first + t * 16 + lane / 4 + i / 2 * 8, column = n_first + n * 8 + lane % 4 * 2 + i % 2;
                if (m < tile.count && column < a.n) put(a, bias, tile.first + m, column, sums[t][n][i]);
            }
}
