// Kernels as C++ on the host, for tests without a GPU: a block's threads are fibers of one thread, barriers and exchanges
// between lanes give way to the next fiber, tensor-core tiles are computed from the fragments that PTX defines. The kernels
// are compiled with g++'s thread instrumentation, whose calls come to checks.cpp instead: it knows whose every byte is.
#pragma once
#include <math.h>
#include <string.h>

// Nothing has linkage, so that all shared memory lies in one section.
#define __device__ static
#define __global__
#define __shared__ static __attribute__((section("baton_shared")))
#define __forceinline__ inline
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))

struct Dim3 {
    u32 x, y, z;
};

// What the fiber that runs now sees.
struct Registers {
    Dim3 thread, block, block_size, grid_size;
    u8* dynamic_shared;
};
extern Registers registers;
#define threadIdx registers.thread
#define blockIdx registers.block
#define blockDim registers.block_size
#define gridDim registers.grid_size

void block_barrier();
// Orders the memory of a warp, as __syncwarp does.
void warp_sync();
// `bytes` of this lane's to all lanes: a table of 32 places of 64 bytes, good until this lane's next exchange. Orders no memory.
const u8* exchange(const void* mine, u32 bytes);
void tile_product(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
void tile_product_fp8(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
void load_matrices_of(u32 (&r)[4], const bf16* row, bool turned);
void shared_add(u64* at, u64 x);
void copy_async(void* to, const void* from, bool there);
void copies_commit();
void copies_wait_for(int left);
// Products of warp groups: done when they are waited for, with what then lies in registers and in shared memory.
void shared_fence();
void group_fence();
void group_product_of(float* d, int tiles, const u32* x, u64 x_at, u64 w_at, bool adds, bool turned);
void group_commit();
void group_wait_for(int left);
// Tensor memory, and barriers in shared memory (tensor.cpp): products, loads and stores are done as late as can be.
bool elected();
void tensor_take(u32* at);
void tensor_give(u32 memory);
void tensor_product(u32 d, u64 x, u64 w, u32 kind, bool adds);
void tensor_product_held(u32 d, u32 x, u64 w, u32 kind, bool adds);
void tensor_commit(u64* barrier);
void tensor_fence_before();
void tensor_fence_after();
void tensor_load_of(float* r, u32 columns, u32 at);
void tensor_loaded_all();
void tensor_store(u32 at, const float (&r)[32]);
void tensor_stored();
void barrier_make(u64* at, u32 arrivals);
void barriers_made();
void barrier_arrive(u64* at);
bool barrier_wait(u64* at, u32 parity);
// `bytes` at a multiple of so many.
void load_aligned(void* to, const void* from, u32 bytes);
void store_aligned(void* to, const void* from, u32 bytes);

typedef void (*Kernel)(const void* args);
struct Registered {
    Registered(const char* name, Kernel kernel, u32 threads);
};

#define KERNEL(name, Args, threads, ...)                                         \
    static void name##_body(const Args& a);                                      \
    static void name##_call(const void* args) { name##_body(*(const Args*)args); } \
    static Registered name##_registered(#name, name##_call, threads);            \
    static void name##_body(const Args& a)

#define DYNAMIC_SHARED(type, name) type* name = (type*)registers.dynamic_shared
#define __syncthreads block_barrier
#define __popc __builtin_popcount
#define __clz(x) ((x) ? __builtin_clz(x) : 32)

inline int this_lane() {
    return threadIdx.x % 32;
}

template <typename T>
static inline T lane_get(T x, int lane) {
    T got;
    memcpy(&got, exchange(&x, sizeof x) + (lane & 31) * 64, sizeof got);
    return got;
}

template <typename T>
static inline T lane_xor(T x, int mask) {
    return lane_get(x, this_lane() ^ mask);
}

static inline u32 lane_ballot(bool x) {
    const u8* all = exchange(&x, 1);
    u32 bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= (u32)all[lane * 64] << lane;
    return bits;
}

static inline u32 lane_same(u32 x) {
    const u8* all = exchange(&x, sizeof x);
    u32 bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= (u32)(memcmp(all + lane * 64, &x, sizeof x) == 0) << lane;
    return bits;
}

static inline float bits_float(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline u32 float_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float half_to_float(u16 bits) {
    int exponent = bits >> 10 & 31;
    float fraction = (float)(bits & 1023), x;
    if (exponent == 31) x = fraction ? NAN : INFINITY;
    else if (exponent == 0) x = ldexpf(fraction, -24);
    else x = ldexpf(1024.0f + fraction, exponent - 25);
    return bits & 0x8000 ? -x : x;
}

static inline u32 only_here(u32 x) {
    return x;
}

static inline float power_of_two(float x) {
    return exp2f(x);
}

static inline u32 rounded_bits(float x) {
    u32 bits = float_bits(x);
    // To nearest even; not-a-number stays one.
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 64;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline u32 pair_bits(float low, float high) {
    return rounded_bits(low) | rounded_bits(high) << 16;
}

static inline u32 fp8_bits(float x) {
    u32 sign = float_bits(x) >> 24 & 128;
    float size = fabsf(x);
    if (size != size) return 127;
    if (size >= 448.0f) return sign | 126;
    // To a multiple of the last place, even where two are as near.
    int exponent = size < 0.015625f ? -6 : ilogbf(size);
    int steps = (int)rintf(ldexpf(size, 3 - exponent));
    return sign | (steps < 8 ? steps : ((exponent + 6) << 3) + steps);
}

static inline u32 pair_fp8(float low, float high) {
    return fp8_bits(low) | fp8_bits(high) << 8;
}

static inline void load_four(u32 (&r)[4], const void* at) {
    load_aligned(r, at, 16);
}

static inline void store_four(void* at, const u32 (&r)[4]) {
    store_aligned(at, r, 16);
}

static inline void store_four_shared(void* at, const u32 (&r)[4]) {
    store_aligned(at, r, 16);
}

static inline void load_matrices(u32 (&r)[4], const bf16* row) {
    load_matrices_of(r, row, false);
}

static inline void load_matrices_turned(u32 (&r)[4], const bf16* row) {
    load_matrices_of(r, row, true);
}

template <int LEFT>
static inline void copies_wait() {
    copies_wait_for(LEFT);
}

// As the descriptors of products have them.
static inline u32 shared_address(const void* at) {
    return (u32)((u64)at - (u64)registers.dynamic_shared);
}

template <int NT>
static inline void group_product(float (&d)[NT][4], u64 x, u64 w, bool adds) {
    group_product_of(d[0], NT, nullptr, x, w, adds, false);
}

template <int NT>
static inline void group_product_turned(float (&d)[NT][4], const u32 (&x)[4], u64 w) {
    group_product_of(d[0], NT, x, 0, w, true, true);
}

template <int LEFT>
static inline void group_wait() {
    group_wait_for(LEFT);
}

template <typename T>
static inline void settle(T&) {}

template <int N>
static inline void tensor_load(float (&r)[N][32], u32 at) {
    tensor_load_of(r[0], N * 32, at);
}

template <int N>
static inline void tensor_loaded(float (&)[N][32]) {
    tensor_loaded_all();
}
