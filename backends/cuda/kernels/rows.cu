// Operations that see one row at a time: gathers, norms, sums, gated units.
#include "device.cuh"

struct GatherArgs {
    u64 table, rows, out;  // [*, width] T, [count] u32, [count, width] T
    u32 width, count;
};

template <typename T>
__device__ void gather(const GatherArgs& a) {
    u32 row = blockIdx.x;
    const T* from = (const T*)a.table + (u64)((const u32*)a.rows)[row] * a.width;
    T* to = (T*)a.out + (u64)row * a.width;
    for (u32 i = threadIdx.x; i < a.width; i += blockDim.x) to[i] = from[i];
}

KERNEL(gather_f32, GatherArgs) { gather<float>(a); }
KERNEL(gather_bf16, GatherArgs) { gather<bf16>(a); }

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
    for (u32 i = threadIdx.x; i < a.width; i += blockDim.x) {
        float value = up(x[i]);
        squares += value * value;
    }
    float factor = 1.0f / sqrtf(block_sum(squares) / (float)a.width + a.eps);
    for (u32 i = threadIdx.x; i < a.width; i += blockDim.x)
        out[i] = down<T>(up(down<T>(up(x[i]) * factor)) * up(weight[i]));
}

KERNEL(norm_f32, NormArgs) { norm<float>(a); }
KERNEL(norm_bf16, NormArgs) { norm<bf16>(a); }

struct AddArgs {
    u64 x, y, out;  // [rows, width] T; y [width] where `broadcast`
    u64 count;
    u32 width, broadcast;
};

template <typename T>
__device__ void add(const AddArgs& a) {
    const T *x = (const T*)a.x, *y = (const T*)a.y;
    T* out = (T*)a.out;
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += step)
        out[i] = down<T>(up(x[i]) + up(y[a.broadcast ? i % a.width : i]));
}

KERNEL(add_f32, AddArgs) { add<float>(a); }
KERNEL(add_bf16, AddArgs) { add<bf16>(a); }

struct GluArgs {
    u64 x, out;  // [rows, gate | up] T, [rows, width] T
    u64 count;   // rows * width
    u32 width;
};

template <typename T>
__device__ void glu(const GluArgs& a) {
    const T* x = (const T*)a.x;
    T* out = (T*)a.out;
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += step) {
        u64 row = i / a.width, at = row * 2 * a.width + i % a.width;
        float gate = up(x[at]);
        float silu = gate / (1.0f + expf(-gate));
        out[i] = down<T>(up(down<T>(silu)) * up(x[at + a.width]));
    }
}

KERNEL(glu_f32, GluArgs) { glu<float>(a); }
KERNEL(glu_bf16, GluArgs) { glu<bf16>(a); }

struct WidenArgs {
    u64 x, out;  // [count] bf16, [count] f32
    u64 count;
};

KERNEL(widen, WidenArgs) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += step)
        ((float*)a.out)[i] = up(((const bf16*)a.x)[i]);
}
