// Operations that see one row at a time: gathers, norms, sums, gated units.
#include "device.cuh"

// Where a width is a multiple of 8, threads take 8 elements at once: rows begin at multiples of 16 bytes then.

struct GatherArgs {
    u64 table, rows, out;  // [*, width] T, [count] u32, [count, width] T
    u32 width, count;
};

template <typename T>
__device__ void gather(const GatherArgs& a) {
    u32 row = blockIdx.x;
    const T* from = (const T*)a.table + (u64)((const u32*)a.rows)[row] * a.width;
    T* to = (T*)a.out + (u64)row * a.width;
    if (a.width % 8 == 0) {
        for (u32 i = threadIdx.x * 8; i < a.width; i += blockDim.x * 8) {
            float x[8];
            load8(x, from + i);
            store8(to + i, x);
        }
        return;
    }
    for (u32 i = threadIdx.x; i < a.width; i += blockDim.x) to[i] = from[i];
}

KERNEL(gather_f32, GatherArgs, 256) { gather<float>(a); }
KERNEL(gather_bf16, GatherArgs, 256) { gather<bf16>(a); }

struct NormArgs {
    u64 x, weight, out;  // [rows, width] T, [width] T, [rows, width] T
    u32 width;
    float eps;
};

// x / rms(x), rounded, times the scale, rounded.
template <typename T>
__device__ void norm(const NormArgs& a) {
    const T* x = (const T*)a.x + (u64)blockIdx.x * a.width;
    T* out = (T*)a.out + (u64)blockIdx.x * a.width;
    const T* weight = (const T*)a.weight;
    float squares = 0.0f;
    if (a.width % 8 == 0) {
        for (u32 i = threadIdx.x * 8; i < a.width; i += blockDim.x * 8) {
            float values[8];
            load8(values, x + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) squares += values[j] * values[j];
        }
        float factor = 1.0f / sqrtf(block_sum(squares) / (float)a.width + a.eps);
        for (u32 i = threadIdx.x * 8; i < a.width; i += blockDim.x * 8) {
            float values[8], scales[8];
            load8(values, x + i);
            load8(scales, weight + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) values[j] = up(down<T>(values[j] * factor)) * scales[j];
            store8(out + i, values);
        }
        return;
    }
    for (u32 i = threadIdx.x; i < a.width; i += blockDim.x) {
        float value = up(x[i]);
        squares += value * value;
    }
    float factor = 1.0f / sqrtf(block_sum(squares) / (float)a.width + a.eps);
    for (u32 i = threadIdx.x; i < a.width; i += blockDim.x)
        out[i] = down<T>(up(down<T>(up(x[i]) * factor)) * up(weight[i]));
}

KERNEL(norm_f32, NormArgs, 256) { norm<float>(a); }
KERNEL(norm_bf16, NormArgs, 256) { norm<bf16>(a); }

struct AddArgs {
    u64 x, y, out;  // [rows, width] T; y [width] where `broadcast`
    u32 width, broadcast;
};

// Grid: rows, pieces of 8 columns for each thread.
template <typename T>
__device__ void add(const AddArgs& a) {
    u64 row = (u64)blockIdx.x * a.width;
    const T *x = (const T*)a.x + row, *y = (const T*)a.y + (a.broadcast ? 0 : row);
    T* out = (T*)a.out + row;
    u32 first = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (first >= a.width) return;
    if (a.width % 8 == 0) {
        float left[8], right[8];
        load8(left, x + first);
        load8(right, y + first);
#pragma unroll
        for (int j = 0; j < 8; ++j) left[j] += right[j];
        store8(out + first, left);
        return;
    }
    for (u32 i = first; i < a.width && i < first + 8; ++i) out[i] = down<T>(up(x[i]) + up(y[i]));
}

KERNEL(add_f32, AddArgs, 256) { add<float>(a); }
KERNEL(add_bf16, AddArgs, 256) { add<bf16>(a); }

struct GluArgs {
    u64 x, out;  // [rows, gate | up] T, [rows, width] T
    u32 width, clamped;
    float limit, slope;  // where clamped
};

template <typename T>
__device__ __forceinline__ float rounded(float x) {
    return up(down<T>(x));
}

template <typename T, bool CLAMPED>
__device__ __forceinline__ float gated(const GluArgs& a, float gate, float other) {
    if (!CLAMPED) return rounded<T>(gate / (1.0f + expf(-gate))) * other;
    // What is no number stays none.
    gate = gate > a.limit ? a.limit : gate;
    other = other > a.limit ? a.limit : other < -a.limit ? -a.limit : other;
    const float opened = rounded<T>(1.0f / (1.0f + expf(-rounded<T>(gate * a.slope))));
    return rounded<T>(other + 1.0f) * rounded<T>(gate * opened);
}

// Grid as in `add`.
template <typename T, bool CLAMPED>
__device__ void glu(const GluArgs& a) {
    const T* x = (const T*)a.x + (u64)blockIdx.x * 2 * a.width;
    T* out = (T*)a.out + (u64)blockIdx.x * a.width;
    u32 first = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (first >= a.width) return;
    if (a.width % 8 == 0) {
        float gate[8], other[8];
        load8(gate, x + first);
        load8(other, x + a.width + first);
#pragma unroll
        for (int j = 0; j < 8; ++j) gate[j] = gated<T, CLAMPED>(a, gate[j], other[j]);
        store8(out + first, gate);
        return;
    }
    for (u32 i = first; i < a.width && i < first + 8; ++i) out[i] = down<T>(gated<T, CLAMPED>(a, up(x[i]), up(x[a.width + i])));
}

KERNEL(glu_f32, GluArgs, 256) { a.clamped ? glu<float, true>(a) : glu<float, false>(a); }
KERNEL(glu_bf16, GluArgs, 256) { a.clamped ? glu<bf16, true>(a) : glu<bf16, false>(a); }

struct ConvertArgs {
    u64 x, out;  // [count] of one type, [count] of the other
    u64 count;
};

KERNEL(widen, ConvertArgs, 256) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += step)
        ((float*)a.out)[i] = up(((const bf16*)a.x)[i]);
}

KERNEL(narrow, ConvertArgs, 256) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += step)
        ((bf16*)a.out)[i] = down<bf16>(((const float*)a.x)[i]);
}

struct SideBySideArgs {
    u64 parts, out;  // a rank's columns [rows, width] f32; [rows, out_width] f32
    u32 width, out_width, first;
};

// One rank's columns among those of all. Grid: rows.
KERNEL(side_by_side, SideBySideArgs, 256) {
    const float* from = (const float*)a.parts + (u64)blockIdx.x * a.width;
    float* to = (float*)a.out + (u64)blockIdx.x * a.out_width + a.first;
    for (u32 i = threadIdx.x; i < a.width; i += blockDim.x) to[i] = from[i];
}
