// Products of FP8 weights with inputs that are rounded to FP8 too, 128 of a row with a scale of their own: tensor cores
// multiply FP8 at twice the rate of bf16. Sums of 128 inputs are scaled and added in f32. Where this is not asked for, FP8
// weights are multiplied as bf16 (product.cu).
#include "product.cuh"

const int CHUNK = 128;  // inputs that share a scale

struct RoundArgs {
    u64 x, codes, scales;  // [gridDim.x, width] bf16, the same in E4M3, [gridDim.x, chunks] f32
    u32 width, chunks;     // width: a multiple of 16
};

// One warp a chunk, one block a row. What is not finite stays so.
KERNEL(round_rows, RoundArgs, 256) {
    u32 lane = threadIdx.x % 32;
    const bf16* x = (const bf16*)a.x + (u64)blockIdx.x * a.width;
    u32* codes = (u32*)((u8*)a.codes + (u64)blockIdx.x * a.width);
    for (u32 chunk = threadIdx.x / 32; chunk < a.chunks; chunk += blockDim.x / 32) {
        u32 at = chunk * CHUNK + lane * 4;
        float value[4] = {0, 0, 0, 0}, most = 0.0f;
        if (at < a.width)
#pragma unroll
            for (int i = 0; i < 4; ++i) value[i] = up(x[at + i]), most = fmaxf(most, fabsf(value[i]));
        float scale = warp_max(most) / 448.0f;
        if (scale == 0.0f) scale = 1.0f;
        if (at < a.width)
            codes[at / 4] = pair_fp8(value[0] / scale, value[1] / scale) | pair_fp8(value[2] / scale, value[3] / scale) << 16;
        if (lane == 0) ((float*)a.scales)[(u64)blockIdx.x * a.chunks + chunk] = scale;
    }
}

struct Fp8Args {
    ProductArgs product;  // x: [*, k] E4M3; quant: FP8, k a multiple of 16, no chunk in two blocks of scales
    u64 x_scales;         // [*, chunks] f32
};

// 128 x 128 outputs a block, 32 x 64 a warp; two stages of a chunk.
KERNEL(product_fp8, Fp8Args, 256) {
    const ProductArgs& p = a.product;
    const int BM = 128, BN = 128, WM = 32, WN = 64, S = CHUNK + 16, THREADS = 256, MT = WM / 16, NT = WN / 8;
    const int STAGE = (BM + BN) * S;
    DYNAMIC_SHARED(u8, shared);
    float* factors = (float*)(shared + 2 * STAGE);  // [2][BM + BN]
    const RowTile tile = tile_of(p, BM);
    if (tile.count == 0) return;  // the same for all threads
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int wm = warp % (BM / WM) * WM, wn = warp / (BM / WM) * WN;
    const u32 n_first = blockIdx.x * BN, chunks = (p.k + CHUNK - 1) / CHUNK;
    const Quant quant = quant_of(p, tile.expert);

    // A thread brings one factor of a chunk: of a row, or of an output.
    const int mine = threadIdx.x;
    const bool of_row = mine < BM;
    const bool has_factor = of_row ? mine < (int)tile.count : n_first + mine - BM < p.n;
    const u32 line = !has_factor ? 0
                     : of_row    ? row_of(p, tile.first + mine) * chunks
                                 : (quant.origin_row + n_first + mine - BM) / quant.group_rows * quant.scale_cols;
    auto factor = [&](u32 chunk) {
        if (!has_factor) return 0.0f;
        if (of_row) return ((const float*)a.x_scales)[line + chunk];
        return scale_at(quant.scales, line + (quant.origin_col + chunk * CHUNK) / quant.group, quant.scale_type);
    };
    auto fill = [&](u32 chunk) {
        u8 *sx = shared + chunk % 2 * STAGE, *sw = sx + BM * S;
        for (int i = threadIdx.x; i < (BM + BN) * CHUNK / 16; i += THREADS) {
            int at = i / (CHUNK / 16), c = i % (CHUNK / 16) * 16;
            u32 k = chunk * CHUNK + c;
            if (at < BM) {
                bool there = at < (int)tile.count && k < p.k;
                u32 row = row_of(p, tile.first + (there ? at : 0));
                copy_async(sx + at * S + c, (const u8*)p.x + (u64)row * p.k + (there ? k : 0), there);
            } else {
                u32 n = n_first + at - BM;
                bool there = n < p.n && k < p.k;
                const u8* codes = (const u8*)quant.codes + (u64)(there ? n : 0) * quant.row_bytes;
                copy_async(sw + (at - BM) * S + c, codes + (there ? k : 0), there);
            }
        }
    };

    float total[MT][NT][4];
    clear(total);

    fill(0);
    copies_commit();
    factors[mine] = factor(0);
    for (u32 chunk = 0; chunk < chunks; ++chunk) {
        copies_wait<0>();
        __syncthreads();  // this chunk is there, and the one before is no longer read
        float next = 0.0f;
        if (chunk + 1 < chunks) {
            fill(chunk + 1);
            next = factor(chunk + 1);
        }
        copies_commit();
        const u8 *sx = shared + chunk % 2 * STAGE, *sw = sx + BM * S;
        float sum[MT][NT][4];
        clear(sum);
#pragma unroll
        for (int k = 0; k < CHUNK; k += 32) {
            u32 xf[MT][4];
#pragma unroll
            for (int t = 0; t < MT; ++t)
                load_matrices(xf[t], (const bf16*)(sx + (wm + t * 16 + lane / 8 % 2 * 8 + lane % 8) * S + k + lane / 16 * 16));
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
                u32 wf[4];
                load_matrices(wf, (const bf16*)(sw + (wn + n * 8 + lane / 16 * 8 + lane % 8) * S + k + lane / 8 % 2 * 16));
                u32 low[2] = {wf[0], wf[1]}, high[2] = {wf[2], wf[3]};
#pragma unroll
                for (int t = 0; t < MT; ++t) {
                    tile_product_fp8(sum[t][n], xf[t], low);
                    tile_product_fp8(sum[t][n + 1], xf[t], high);
                }
            }
        }
        const float *by_row = factors + chunk % 2 * (BM + BN), *by_output = by_row + BM;
#pragma unroll
        for (int t = 0; t < MT; ++t)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    total[t][n][i] += sum[t][n][i] * (by_row[wm + t * 16 + lane / 4 + i / 2 * 8] *
                                                      by_output[wn + n * 8 + lane % 4 * 2 + i % 2]);
        if (chunk + 1 < chunks) factors[(chunk + 1) % 2 * (BM + BN) + mine] = next;
    }
    copies_wait<0>();
    put_tiles(p, tile, wm, n_first + wn, total);
}
