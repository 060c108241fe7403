// x W^T for weights that cuBLASLt does not take: quantised ones, experts, few rows. One kernel per number of rows; all
// take plain and quantised weights and, for experts, a list of tiles that `routes` (moe.cu) made on the device.
#include "product.cuh"

// Tensor cores: BM x BN outputs a block, WM x WN a warp, three stages of 32 inputs. k is a multiple of 8.
template <int BM, int BN, int WM, int WN>
__device__ void product(const ProductArgs& a) {
    const int BK = 32, S = BK + 8, STAGES = 3, THREADS = BM / WM * (BN / WN) * 32, MT = WM / 16, NT = WN / 8;
    const int STAGE = (BM + BN) * S;
    DYNAMIC_SHARED(bf16, shared);
    const RowTile tile = tile_of(a, BM);
    if (tile.count == 0) return;  // the same for all threads
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int wm = warp % (BM / WM) * WM, wn = warp / (BM / WM) * WN;
    const u32 n_first = blockIdx.x * BN;
    const Quant quant = quant_of(a, tile.expert);
    const bf16* w = (const bf16*)a.w + (u64)tile.expert * a.n * a.k;

    float acc[MT][NT][4];
    clear(acc);

    const int steps = (a.k + BK - 1) / BK;
    for (int step = -(STAGES - 1); step < steps; ++step) {
        const int next = step + STAGES - 1;
        if (step >= 0) {
            copies_wait<STAGES - 2>();
            __syncthreads();  // this stage is there, and the one to be filled is no longer read
        }
        if (next < steps) {
            bf16 *sx = shared + next % STAGES * STAGE, *sw = sx + BM * S;
            for (int i = threadIdx.x; i < BM * BK / 8; i += THREADS) {
                int m = i / (BK / 8), k = next * BK + i % (BK / 8) * 8;
                bool there = m < (int)tile.count && k < (int)a.k;
                u32 row = row_of(a, tile.first + (there ? m : 0));
                copy_async(sx + m * S + i % (BK / 8) * 8, (const bf16*)a.x + (u64)row * a.k + (there ? k : 0), there);
            }
            for (int i = threadIdx.x; i < BN * BK / 8; i += THREADS) {
                int n = i / (BK / 8), k = next * BK + i % (BK / 8) * 8;
                bool there = n_first + n < a.n && k < (int)a.k;
                bf16* to = sw + n * S + i % (BK / 8) * 8;
                if (a.w) {
                    copy_async(to, w + (u64)(there ? n_first + n : 0) * a.k + (there ? k : 0), there);
                } else {
                    float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
                    if (there) decode8(quant, n_first + n, k, x);
#pragma unroll
                    for (int j = 0; j < 4; ++j) ((u32*)to)[j] = pair_bits(x[2 * j], x[2 * j + 1]);
                }
            }
        }
        copies_commit();
        if (step < 0) continue;
        const bf16 *sx = shared + step % STAGES * STAGE, *sw = sx + BM * S;
#pragma unroll
        for (int k = 0; k < BK; k += 16) {
            u32 xf[MT][4];
#pragma unroll
            for (int t = 0; t < MT; ++t)
                load_matrices(xf[t], sx + (wm + t * 16 + lane / 8 % 2 * 8 + lane % 8) * S + k + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
                u32 wf[4];
                load_matrices(wf, sw + (wn + n * 8 + lane / 16 * 8 + lane % 8) * S + k + lane / 8 % 2 * 8);
                tile_products(acc, n, xf, wf);
            }
        }
    }
    copies_wait<0>();
    put_tiles(a, tile, wm, n_first + wn, acc);
}

KERNEL(product_many, ProductArgs, 256) { product<128, 128, 32, 64>(a); }
KERNEL(product_some, ProductArgs, 128) { product<32, 128, 32, 32>(a); }

const int ROWS_FEW = 8;

// Up to 8 rows: one warp an output, the weights read once at the speed of memory. k is a multiple of 8.
KERNEL(product_few, ProductArgs, 256) {
    const RowTile tile = tile_of(a, ROWS_FEW);
    u32 lane = threadIdx.x % 32, n = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (tile.count == 0 || n >= a.n) return;  // the same for a warp
    const Quant quant = quant_of(a, tile.expert);
    const bf16* w = (const bf16*)a.w + ((u64)tile.expert * a.n + n) * a.k;
    float sums[ROWS_FEW];
#pragma unroll
    for (int m = 0; m < ROWS_FEW; ++m) sums[m] = 0.0f;
#pragma unroll 2
    for (u32 k = lane * 8; k < a.k; k += 32 * 8) {
        float x[8];
        if (a.w) load8(x, w + k);
        else decode8(quant, n, k, x);
#pragma unroll
        for (int m = 0; m < ROWS_FEW; ++m) {
            if (m >= (int)tile.count) break;
            float row[8];
            load8(row, (const bf16*)a.x + (u64)row_of(a, tile.first + m) * a.k + k);
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[m] += row[i] * x[i];
        }
    }
    const bf16* bias = bias_of<bf16>(a);
    for (u32 m = 0; m < tile.count; ++m) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < ROWS_FEW; ++i)
            if (i == (int)m) sum = sums[i];
        sum = warp_sum(sum);
        if (lane == 0) put(a, bias, tile.first + m, n, sum);
    }
}

const int PLAIN = 32;

struct PlainTiles {
    float x[PLAIN][9], w[PLAIN][9];
};

__device__ __forceinline__ PlainTiles& plain_tiles() {
    __shared__ PlainTiles tiles;
    return tiles;
}

// Any size and type: 32 x 32 outputs by 256 threads, 8 inputs at a time. f32 steps, and widths that fit no tensor core.
template <typename T>
__device__ void product_plain(const ProductArgs& a) {
    PlainTiles& tiles = plain_tiles();
    const RowTile tile = tile_of(a, PLAIN);
    if (tile.count == 0) return;
    const Quant quant = quant_of(a, tile.expert);
    const T* w = (const T*)a.w + (u64)tile.expert * a.n * a.k;
    const u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16, n_first = blockIdx.x * PLAIN;
    float acc[2][2] = {{0, 0}, {0, 0}};
    for (u32 base = 0; base < a.k; base += 8) {
        __syncthreads();
        u32 line = threadIdx.x / 8, column = threadIdx.x % 8;
        bool inside = base + column < a.k;
        tiles.x[line][column] = inside && line < tile.count
                                    ? up(((const T*)a.x)[(u64)row_of(a, tile.first + line) * a.k + base + column])
                                    : 0.0f;
        if (a.w) {
            tiles.w[line][column] = inside && n_first + line < a.n ? up(w[(u64)(n_first + line) * a.k + base + column]) : 0.0f;
        } else if (threadIdx.x < PLAIN) {
            float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
            if (n_first + threadIdx.x < a.n) decode8(quant, n_first + threadIdx.x, base, x);
            // As the other kernels: a bf16 step multiplies bf16 numbers.
#pragma unroll
            for (int i = 0; i < 8; ++i) tiles.w[threadIdx.x][i] = up(down<T>(x[i]));
        }
        __syncthreads();
        for (int k = 0; k < 8; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) acc[i][j] += tiles.x[ty + 16 * i][k] * tiles.w[tx + 16 * j][k];
    }
    const T* bias = bias_of<T>(a);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            u32 m = ty + 16 * i, n = n_first + tx + 16 * j;
            if (m < tile.count && n < a.n) put(a, bias, tile.first + m, n, acc[i][j]);
        }
}

KERNEL(product_plain_f32, ProductArgs, 256) { product_plain<float>(a); }
KERNEL(product_plain_bf16, ProductArgs, 256) { product_plain<bf16>(a); }

struct DecodeArgs {
    Quant quant;
    u64 rows, out;  // [gridDim.x] u32 row, or 0: in order; [gridDim.x, cols] T
    u32 cols;
};

// Rows of a quantised matrix as numbers: embeddings, and weights for cuBLASLt when rows are many.
template <typename T>
__device__ void decode_rows(const DecodeArgs& a) {
    u32 row = a.rows ? ((const u32*)a.rows)[blockIdx.x] : blockIdx.x;
    T* out = (T*)a.out + (u64)blockIdx.x * a.cols;
    for (u32 k = threadIdx.x * 8; k < a.cols; k += blockDim.x * 8) {
        float x[8];
        decode8(a.quant, row, k, x);
#pragma unroll
        for (int i = 0; i < 8 && k + i < a.cols; ++i) out[k + i] = down<T>(x[i]);
    }
}

KERNEL(decode_rows_f32, DecodeArgs, 256) { decode_rows<float>(a); }
KERNEL(decode_rows_bf16, DecodeArgs, 256) { decode_rows<bf16>(a); }
