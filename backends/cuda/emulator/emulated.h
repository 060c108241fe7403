// Kernels as C++ on the host, for tests without a GPU: a block's threads are fibers of one thread, barriers and exchanges
// between lanes give way to the next fiber, tensor-core tiles are computed from the fragments that PTX defines.
#pragma once
#include <math.h>
#include <string.h>
#include <ucontext.h>
#include <string>
#include <unordered_map>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))

struct Dim3 {
    u32 x, y, z;
};

// The fiber that runs now.
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;
extern u8* dynamic_shared_memory;

void give_way();
void block_barrier();
void warp_barrier();
// This warp's exchange area: 32 places of 64 bytes.
u8* exchange(int lane);

typedef void (*Kernel)(const void* args);
struct Registered {
    Registered(const char* name, Kernel kernel);
};

#define KERNEL(name, Args)                                                       \
    static void name##_body(const Args& a);                                      \
    static void name##_call(const void* args) { name##_body(*(const Args*)args); } \
    static Registered name##_registered(#name, name##_call);                     \
    static void name##_body(const Args& a)

#define DYNAMIC_SHARED(type, name) type* name = (type*)dynamic_shared_memory
#define __syncthreads block_barrier
#define __popc __builtin_popcount

inline int this_lane() {
    return threadIdx.x % 32;
}

template <typename T>
inline T lane_get(T x, int lane) {
    memcpy(exchange(this_lane()), &x, sizeof x);
    warp_barrier();
    T got;
    memcpy(&got, exchange(lane & 31), sizeof got);
    warp_barrier();
    return got;
}

template <typename T>
inline T lane_xor(T x, int mask) {
    return lane_get(x, this_lane() ^ mask);
}

inline u32 lane_ballot(bool x) {
    u8 mine = x;
    memcpy(exchange(this_lane()), &mine, 1);
    warp_barrier();
    u32 all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= (u32)*exchange(lane) << lane;
    warp_barrier();
    return all;
}

inline void warp_sync() {
    warp_barrier();
}

inline float bits_float(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline u32 float_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float half_to_float(u16 bits) {
    int exponent = bits >> 10 & 31;
    float fraction = (float)(bits & 1023), x;
    if (exponent == 31) x = fraction ? NAN : INFINITY;
    else if (exponent == 0) x = ldexpf(fraction, -24);
    else x = ldexpf(1024.0f + fraction, exponent - 25);
    return bits & 0x8000 ? -x : x;
}

inline float low_half(u32 pair) {
    return bits_float(pair << 16);
}

inline float high_half(u32 pair) {
    return bits_float(pair & 0xffff0000u);
}

inline void tile_product(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    u32 mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    memcpy(exchange(this_lane()), mine, sizeof mine);
    warp_barrier();
    for (int i = 0; i < 4; ++i) {
        int row = this_lane() / 4 + i / 2 * 8, column = this_lane() % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            // a: register by (row / 8, k / 8), lane by (row % 8, k % 8 / 2); b: register by k / 8.
            const u32* left = (const u32*)exchange(row % 8 * 4 + k % 8 / 2);
            const u32* right = (const u32*)exchange(column * 4 + k % 8 / 2);
            u32 x = left[row / 8 + k / 8 * 2], y = right[4 + k / 8];
            d[i] += k % 2 ? high_half(x) * high_half(y) : low_half(x) * low_half(y);
        }
    }
    warp_barrier();
}

inline void load_matrices_of(u32 (&r)[4], const bf16* row, bool turned) {
    memcpy(exchange(this_lane()), &row, sizeof row);
    warp_barrier();
    for (int i = 0; i < 4; ++i) {
        bf16 pair[2];
        for (int j = 0; j < 2; ++j) {
            int line = this_lane() / 4, column = this_lane() % 4 * 2 + j;
            const bf16* from;
            memcpy(&from, exchange(i * 8 + (turned ? column : line)), sizeof from);
            pair[j] = from[turned ? line : column];
        }
        memcpy(&r[i], pair, 4);
    }
    warp_barrier();
}

inline void load_matrices(u32 (&r)[4], const bf16* row) {
    load_matrices_of(r, row, false);
}

inline void load_matrices_turned(u32 (&r)[4], const bf16* row) {
    load_matrices_of(r, row, true);
}

inline void copy_async(void* to, const void* from, bool there) {
    // What the hardware demands.
    if ((u64)to % 16 || (there && (u64)from % 16)) __builtin_trap();
    if (there) memcpy(to, from, 16);
    else memset(to, 0, 16);
}

inline void copies_commit() {}

template <int LEFT>
inline void copies_wait() {}
