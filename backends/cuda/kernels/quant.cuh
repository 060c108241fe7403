// Eight consecutive numbers of a quantised matrix, whatever its format. The formats are those of backends/core/src/quant.rs.
#pragma once
#include "device.cuh"

enum Format {
    AFFINE, INT4, FP8, FP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4
};
enum ScaleType { SCALE_F32, SCALE_F16, SCALE_BF16 };

struct Quant {
    u64 codes, scales, biases;  // [rows, row_bytes] u8, [.., scale_cols] of scale_type
    u32 format, bits, group;    // group: columns that share a scale
    u32 group_rows;             // rows that share one (FP8), else 1
    u32 origin_row, origin_col; // of [0, 0] within its scale's block (FP8)
    u32 scale_type, scale_cols, row_bytes, cols;
};

__device__ __forceinline__ float scale_at(u64 base, u64 index, u32 type) {
    if (type == SCALE_F32) return ((const float*)base)[index];
    u16 bits = ((const u16*)base)[index];
    return type == SCALE_F16 ? half_to_float(bits) : bits_float((u32)bits << 16);
}

__device__ __forceinline__ float e4m3(u8 code) {
    // Exponent and fraction moved to their places in a float, and the biases' difference multiplied in: subnormals too.
    float x = bits_float((u32)(code & 127) << 20) * 1.329227995784916e36f;  // 2^120
    return code & 128 ? -x : x;
}

// E2M1, four bits: as E4M3 above, subnormals too.
__device__ __forceinline__ float e2m1(u32 code) {
    float x = bits_float((code & 7) << 22) * 8.507059173023462e37f;  // 2^126
    return code & 8 ? -x : x;
}

// What the codes of IQ4_NL and IQ4_XS stand for, four to a word, lowest first.
__device__ __forceinline__ float iq4(u32 code) {
    const u32 fours = code < 8 ? (code < 4 ? 0xbfad9881u : 0xf6eaddcfu) : (code < 12 ? 0x26190d01u : 0x71594535u);
    return (float)(i8)(u8)(fours >> code % 4 * 8);
}

__device__ __forceinline__ float half_at(const u8* at) {
    return half_to_float((u16)at[0] | (u16)at[1] << 8);
}

// Little-endian words at a multiple of their size.
__device__ __forceinline__ u32 word_at(const u8* at) {
    return *(const u32*)at;
}

__device__ __forceinline__ u32 half_word_at(const u8* at) {
    return *(const u16*)at;
}

// Columns [k, k + 8) of row `row`, zeros behind the last; k is a multiple of 8.
__device__ __forceinline__ void decode8(const Quant& q, u32 row, u32 k, float (&out)[8]) {
    const u8* codes = (const u8*)q.codes + (u64)row * q.row_bytes;
    if (q.format == AFFINE || q.format == INT4) {
        const u8* at = codes + (u64)k * q.bits / 8;
        u64 word = 0;
        if (q.bits == 4 && q.row_bytes % 4 == 0) word = word_at(at);
        else if (q.bits == 8 && q.row_bytes % 4 == 0) word = word_at(at) | (u64)word_at(at + 4) << 32;
        else
            for (u32 i = 0; i < q.bits; ++i) word |= (u64)at[i] << (8 * i);
        u64 group = (u64)row * q.scale_cols + k / q.group;
        float scale = scale_at(q.scales, group, q.scale_type);
        float bias = q.format == AFFINE ? scale_at(q.biases, group, q.scale_type) : -8.0f * scale;
        u32 mask = (1u << q.bits) - 1;
        for (int i = 0; i < 8; ++i) out[i] = (float)((u32)(word >> (i * q.bits)) & mask) * scale + bias;
        return;
    }
    if (q.format == FP8) {
        u64 line = (u64)((q.origin_row + row) / q.group_rows) * q.scale_cols;
        if (q.row_bytes % 4 == 0 && q.group % 8 == 0 && q.origin_col % 8 == 0 && k + 8 <= q.cols) {
            float scale = scale_at(q.scales, line + (q.origin_col + k) / q.group, q.scale_type);
            u32 words[2] = {word_at(codes + k), word_at(codes + k + 4)};
#pragma unroll
            for (int i = 0; i < 8; ++i) out[i] = e4m3((u8)(words[i / 4] >> (i % 4 * 8))) * scale;
            return;
        }
        for (int i = 0; i < 8; ++i) {
            out[i] = 0.0f;
            if (k + i < q.cols) out[i] = e4m3(codes[k + i]) * scale_at(q.scales, line + (q.origin_col + k + i) / q.group, q.scale_type);
        }
        return;
    }
    if (q.format == FP4) {
        const float scale = scale_at(q.scales, (u64)row * q.scale_cols + k / q.group, q.scale_type);
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const u32 pair = codes[k / 2 + i / 2];
            out[i] = e2m1(pair & 15) * scale, out[i + 1] = e2m1(pair >> 4) * scale;
        }
        return;
    }
    if (q.format >= IQ4_NL) {
        // Blocks of 32, or (IQ4_XS) eight of them behind their scales; the first sixteen are low halves of bytes.
        const u32 sub = k % 256 / 32;
        const u8 *block = codes, *at;
        float scale;
        if (q.format == IQ4_XS) {
            block += k / 256 * 136;
            const u32 low = block[4 + sub / 2] >> sub % 2 * 4 & 15, high = half_word_at(block + 2) >> 2 * sub & 3;
            scale = half_at(block) * (float)((int)(low | high << 4) - 32);
            at = block + 8 + sub * 16;
        } else if (q.format == IQ4_NL) {
            block += k / 32 * 18;
            scale = half_at(block), at = block + 2;
        } else {
            block += k / 32 * 17;
            // Two to the power of the byte less 127, of which the lowest is not normal.
            scale = block[0] ? bits_float((u32)block[0] << 23) : 5.877471754111438e-39f, at = block + 1;
            if (block[0] == 255) scale = bits_float(0x7fc00000u);
        }
        const u32 shift = k % 32 < 16 ? 0 : 4;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const u32 code = at[k % 16 + i] >> shift & 15;
            out[i] = (q.format == MXFP4 ? e2m1(code) : iq4(code)) * scale;
        }
        return;
    }
    if (q.format == Q2_K || q.format == Q3_K) {
        // Eights have one scale; of each 128 a byte has two bits of four thirty-twos.
        const bool three = q.format == Q3_K;
        const u8* block = codes + k / 256 * (three ? 110 : 84);
        const u32 sub = k % 256 / 16, l = k % 32, shift = k % 128 / 32 * 2;
        const u8* low = block + (three ? 32 : 16) + k % 256 / 128 * 32 + l;
        float scale, least = 0.0f;
        if (three) {
            const u8* packed = block + 96;
            const u32 four = packed[sub % 8] >> sub / 8 * 4 & 15, two = packed[8 + sub % 4] >> sub / 4 * 2 & 3;
            scale = half_at(block + 108) * (float)((int)(four | two << 4) - 32);
        } else {
            scale = half_at(block + 80) * (float)(block[sub] & 15);
            least = half_at(block + 82) * (float)(block[sub] >> 4);
        }
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const u32 twos = half_word_at(low + i) >> shift;
            const u32 ones = three ? half_word_at(block + l + i) >> k % 256 / 32 : 0;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const u32 code = (twos >> j * 8 & 3) | (ones >> j * 8 & 1) << 2;
                out[i + j] = three ? scale * ((float)code - 4.0f) : scale * (float)code - least;
            }
        }
        return;
    }
    if (q.format == Q8_0) {
        const u8* block = codes + k / 32 * 34;
        float d = half_at(block);
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            u32 pair = half_word_at(block + 2 + k % 32 + i);
            out[i] = (float)(i8)(u8)pair * d, out[i + 1] = (float)(i8)(u8)(pair >> 8) * d;
        }
        return;
    }
    if (q.format <= Q5_1) {
        bool has_min = q.format == Q4_1 || q.format == Q5_1, fifth = q.format >= Q5_0;
        u32 head = 2 + (has_min ? 2 : 0), size = head + (fifth ? 4 : 0) + 16;
        const u8* block = codes + k / 32 * size;
        float d = half_at(block), m = has_min ? half_at(block + 2) : 0.0f;
        u32 high = fifth ? (half_word_at(block + head) | half_word_at(block + head + 2) << 16) >> k % 32 : 0;
        // Eights are low halves of bytes, or high ones; blocks have an even number of bytes.
        const u8* at = block + size - 16 + k % 16;
        u32 shift = k % 32 < 16 ? 0 : 4;
        const int zero = has_min ? 0 : fifth ? 16 : 8;
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            u32 pair = half_word_at(at + i) >> shift;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                int code = (int)((pair >> j * 8 & 15) | (high >> (i + j) & 1) << 4);
                out[i + j] = (float)(code - zero) * d + m;
            }
        }
        return;
    }
    if (q.format == Q6_K) {
        // Blocks have an even number of bytes, and an eight one scale.
        const u8* block = codes + k / 256 * 210;
        const u32 part = k % 256 / 128, quarter = k % 128 / 32, l = k % 32;
        const u8 *low = block + part * 64 + quarter % 2 * 32 + l, *high = block + 128 + part * 32 + l;
        const float scale = half_at(block + 208) * (float)(i8)block[192 + part * 8 + quarter * 2 + l / 16];
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            u32 fours = half_word_at(low + i) >> quarter / 2 * 4, twos = half_word_at(high + i) >> quarter * 2;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                u32 code = (fours >> j * 8 & 15) | (twos >> j * 8 & 3) << 4;
                out[i + j] = scale * ((float)code - 32.0f);
            }
        }
        return;
    }
    // Q4_K, Q5_K
    bool fifth = q.format == Q5_K;
    const u8* block = codes + k / 256 * (fifth ? 176 : 144);
    u32 sub = k % 256 / 32;
    const u8* packed = block + 4;
    u32 scale, min;
    if (sub < 4) {
        scale = packed[sub] & 63;
        min = packed[sub + 4] & 63;
    } else {
        scale = (packed[sub + 4] & 15) | packed[sub - 4] >> 6 << 4;
        min = packed[sub + 4] >> 4 | packed[sub] >> 6 << 4;
    }
    float d = half_at(block) * (float)scale, m = half_at(block + 2) * (float)min;
    const u8 *bits = block + 16 + k % 32, *low = block + (fifth ? 48 : 16) + sub / 2 * 32 + k % 32;
    // Blocks are multiples of 16 bytes.
    u32 nibbles[2] = {word_at(low) >> sub % 2 * 4, word_at(low + 4) >> sub % 2 * 4}, high[2] = {0, 0};
    if (fifth) high[0] = word_at(bits) >> sub, high[1] = word_at(bits + 4) >> sub;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        u32 code = nibbles[i / 4] >> (i % 4 * 8) & 15;
        code |= (high[i / 4] >> (i % 4 * 8) & 1) << 4;
        out[i] = d * (float)code - m;
    }
}

// Eight codes as words, with what makes numbers of them: read first, computed later. For matrices whose eights lie in whole words
// and share a scale: FP8, FP4, INT4, and MLX's formats of 4 and 8 bits (`in_words` in src/product.rs).
struct Eight {
    u32 words[2];
    float scale, bias;
};

// Columns [k, k + 8) of such a matrix; k is a multiple of 8 below its columns.
__device__ __forceinline__ Eight fetch8(const Quant& q, u32 row, u32 k) {
    Eight e = {{0, 0}, 0.0f, 0.0f};
    const u8* at = (const u8*)q.codes + (u64)row * q.row_bytes + (q.bits == 4 ? k / 2 : k);
    e.words[0] = word_at(at);
    if (q.bits != 4) e.words[1] = word_at(at + 4);
    if (q.format == FP8) {
        const u64 line = (u64)((q.origin_row + row) / q.group_rows) * q.scale_cols;
        e.scale = scale_at(q.scales, line + (q.origin_col + k) / q.group, q.scale_type);
        return e;
    }
    const u64 group = (u64)row * q.scale_cols + k / q.group;
    e.scale = scale_at(q.scales, group, q.scale_type);
    if (q.format != FP4) e.bias = q.format == AFFINE ? scale_at(q.biases, group, q.scale_type) : -8.0f * e.scale;
    return e;
}

// The numbers, as `decode8` has them.
__device__ __forceinline__ void expand8(const Quant& q, const Eight& e, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (q.format == FP8) out[i] = e4m3((u8)(e.words[i / 4] >> (i % 4 * 8))) * e.scale;
        else if (q.format == FP4) out[i] = e2m1(e.words[0] >> (i * 4) & 15) * e.scale;
        else if (q.bits == 4) out[i] = (float)(e.words[0] >> (i * 4) & 15) * e.scale + e.bias;
        else out[i] = (float)(e.words[i / 4] >> (i % 4 * 8) & 255) * e.scale + e.bias;
    }
}
